"""The projector learns names alone before the run: it tells them apart, changes nothing else, and is the same after a stop."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("peft", reason="teaching goes through PEFT, which is not installed: it is in the train extra")

from tessella.chat import Message
from tessella.checkpoint.read import load
from tessella.errors import ConfigError, DataError
from tessella.inputs import Picture
from tessella.train.batch import Steps
from tessella.train.dataset import Sample
from tessella.train.loop import TrainResult, train
from tessella.train.lora import prepare
from tessella.train.passes import Passes
from tessella.train.recipe import Recipe
from tessella.train.warmup import Names, Warmup
from tiny import tiny_folder

NAMES = {"apple": (200, 30, 30), "rice": (30, 180, 40), "dish": (30, 40, 200), "plate": (240, 240, 240)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("base") / "tiny", "LlamaForCausalLM")


def samples(count: int = 12, size: int = 56) -> list[Sample]:
    """Pictures of one colour with a spot; each is called by a name, and by another in a second turn."""
    out = []
    for i in range(count):
        name = list(NAMES)[i % 4]
        picture = Image.new("RGB", (size, size), NAMES[name])
        picture.putpixel((i % size, i // size), (0, 0, 0))
        said = ("user", "<image>\nname it"), ("assistant", name), ("user", "again"), ("assistant", f"the {name}")
        out.append(Sample(f"made:{i}", tuple(Message(*one) for one in said), (Picture(picture),), f"key{i}"))
    return out


def recipe_of(folder: Path, output: Path, **changes: object) -> Recipe:
    base = Recipe(
        model=str(folder), device="cpu", dtype="float32", samples_per_step=4, epochs=1.0, output=output, tensorboard=False,
        evaluate_every=0, sample_answers=0, lora_rank=4, lora_dropout=0.0, projector_warmup_steps=30,
    )  # fmt: skip
    return replace(base, **changes)


def warmup_of(folder: Path, some: list[Sample], count: int = 30, dtype: str = "float32") -> Warmup:
    loaded = load(folder, device="cpu", dtype=dtype)
    recipe = Recipe(projector_warmup_steps=count)
    prepare(loaded.model, recipe)
    steps = Steps(some, loaded.inputs, looks=len(some), samples_per_step=4, tokens_per_pass=600, seed=0)
    return Warmup(steps, loaded, count, Passes(loaded.model, recipe).features)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pictures_come_to_lie_at_their_names(folder: Path, dtype: str) -> None:
    warmup = warmup_of(folder, samples(), dtype=dtype)
    before = {name: value.clone() for name, value in warmup.values().items()}
    shares = warmup.run(lambda: False)
    assert shares is not None and shares[0] < 0.9 and shares[1] == 1.0
    assert all(value.dtype == torch.float32 and not value.equal(before[name]) for name, value in warmup.values().items())


def test_the_model_is_not_touched_until_it_is_whole(folder: Path) -> None:
    warmup = warmup_of(folder, samples())
    before = {name: value.clone() for name, value in warmup.values().items()}
    assert Warmup.run(warmup, lambda: True) is None
    assert all(value.equal(before[name]) for name, value in warmup.values().items())


def test_a_picture_of_two_names_is_pulled_to_both_and_a_long_answer_is_none(folder: Path) -> None:
    loaded = load(folder, device="cpu", dtype="float32")
    long = Sample("long", (Message("user", "<image>\nwhat"), Message("assistant", "rice " * 40)), samples(1)[0].pictures, "l")
    text = Sample("text", (Message("user", "hi"), Message("assistant", "hello")), (), "t")
    names = Names([*samples(), long, text], loaded)
    assert len(names) == 8 and len(names.of["made:0"]) == 2 and names.of["long"] == () and "text" not in names.of
    torch.testing.assert_close(names.directions.norm(dim=-1), torch.ones(8))


def test_the_split_into_passes_changes_no_gradient(folder: Path) -> None:
    whole, parted = warmup_of(folder, samples()), warmup_of(folder, samples())
    whole.steps.tokens_per_pass, parted.steps.tokens_per_pass = 100_000, 64
    some = whole.steps[0]
    assert len(some.packs) == 1 and len(parted.steps[0].packs) == len(some.places)
    with torch.no_grad():
        whole.centre = parted.centre = whole.pooled(some.packs[0]).mean(0)
    whole.learn(some)
    parted.learn(parted.steps[0])
    for one, other in zip(whole.projector.parameters(), parted.projector.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def learned(result: TrainResult) -> dict[str, torch.Tensor]:
    return load_file(result.adapter / "adapter_model.safetensors")


def test_the_run_begins_at_the_warmed_projector_and_a_stopped_one_comes_to_the_same(folder: Path, tmp_path: Path) -> None:
    cold = learned(train(recipe_of(folder, tmp_path / "cold", projector_warmup_steps=0, learning_rate=1e-9), samples=samples()))
    warm = learned(train(recipe_of(folder, tmp_path / "warm", learning_rate=1e-9), samples=samples()))
    moved = [name for name in warm if not torch.allclose(warm[name], cold[name], atol=1e-6)]
    assert moved and all(".mlp1." in name for name in moved)
    stopped = train(recipe_of(folder, tmp_path / "stopped", learning_rate=1e-9, time_limit_s=1e-9), samples=samples())
    assert not stopped.finished and stopped.steps == 0
    again = learned(train(recipe_of(folder, tmp_path / "stopped", learning_rate=1e-9, resume=True), samples=samples()))
    assert all(torch.equal(again[name], warm[name]) for name in warm)


@pytest.mark.parametrize("changes", [{"projector": "frozen"}, {"projector": "lora"}, {"tower": "full"}])
def test_parts_that_a_warmup_does_not_go_with_are_told(changes: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="projector_warmup_steps is 5, but projector"):
        Recipe(projector_warmup_steps=5, **changes)  # type: ignore[arg-type]


def test_data_without_names_is_told(folder: Path, tmp_path: Path) -> None:
    one = [replace(sample, messages=(sample.messages[0], Message("assistant", "rice"))) for sample in samples()]
    with pytest.raises(DataError, match="the data has 1 different answers of at most 32 tokens"):
        train(recipe_of(folder, tmp_path), samples=one)
