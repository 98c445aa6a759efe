"""Boxes and masks are learned by heart, saved, read again, and resumed to the bit."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="teaching goes through PEFT, which is not installed: it is in the train extra")
pytest.importorskip("scipy", reason="boxes and masks are taught with scipy, which is in the multitask extra")

from tessella.checkpoint.read import load
from tessella.train.loop import train
from tessella.train.recipe import Recipe
from tiny import tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "model", "LlamaForCausalLM", 0)


def recipe(folder: Path, output: Path, **more: object) -> Recipe:
    plain: dict[str, object] = {
        "model": str(folder), "output": output, "decoders": ("boxes",), "scenes": 6, "held_out_scenes": 2, "scene_foods": 4,
        "scene_objects": 2, "samples_per_step": 3, "epochs": 2.0, "device": "cpu", "dtype": "float32", "tensorboard": False,
        "learning_rate": 1e-3, "sample_answers": 0,
    }  # fmt: skip
    return Recipe(**{**plain, **more})  # type: ignore[arg-type]


def test_a_run_saves_adapter_rows_queries_and_decoder_together(folder: Path, tmp_path: Path) -> None:
    result = train(recipe(folder, tmp_path / "run"))
    assert result.finished and (result.adapter / "routing" / "boxes.safetensors").is_file()
    loaded = load(tmp_path / "run", device="cpu", dtype="float32")
    routing = loaded.model.routing
    assert routing is not None and routing.boxes is not None
    assert loaded.tokenizer.routes.first_id == loaded.config.language.vocab_size


def test_a_resumed_run_is_the_same_to_the_bit(folder: Path, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    train(recipe(folder, whole))
    train(recipe(folder, part, time_limit_s=1e-6))
    again = train(recipe(folder, part, resume=True))
    assert again.finished
    files = sorted(path.relative_to(whole / "adapter") for path in (whole / "adapter").rglob("*.safetensors"))
    assert [file.name for file in files] == ["adapter_model.safetensors", "boxes.safetensors", "tokens.safetensors"]
    assert all((whole / "adapter" / file).read_bytes() == (part / "adapter" / file).read_bytes() for file in files)


def test_a_step_is_the_same_however_it_is_cut_into_passes(folder: Path, tmp_path: Path) -> None:
    one = train(recipe(folder, tmp_path / "one", max_steps=1))
    many = train(recipe(folder, tmp_path / "many", max_steps=1, tokens_per_pass=64))
    left, right = (load(one.output, device="cpu", dtype="float32"), load(many.output, device="cpu", dtype="float32"))
    a, b = left.model.routing, right.model.routing
    assert a is not None and b is not None
    torch.testing.assert_close(dict(a.named_parameters()), dict(b.named_parameters()), atol=2e-4, rtol=1e-3)
