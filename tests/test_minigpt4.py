"""MiniGPT-4 assembled from tiny parts: transformers opens it and gives our logits; parts that do not fit are told."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from relatives import relative, spread
from tessella.chat import Message, render, template_named, text_of
from tessella.checkpoint.read import load
from tessella.errors import CheckpointError
from tessella.generate import all_logits
from tessella.image import normalise
from tessella.inputs import Picture
from tiny import tiny_tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
SCRIPT = Path(__file__).parents[1] / "recipes" / "minigpt4" / "assemble.py"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minigpt4_assemble", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("parts")
    blip2, _ = relative(home / "blip2", "blip2")
    tokenizer = tiny_tokenizer()
    size = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    vicuna = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=tokenizer.get_vocab_size(), **size))
    spread(vicuna)
    vicuna.save_pretrained(home / "vicuna")
    tokenizer.save(str(home / "vicuna" / "tokenizer.json"))
    words = {"bos_token": "<s>", "add_bos_token": True, "tokenizer_class": "PreTrainedTokenizerFast"}
    (home / "vicuna" / "tokenizer_config.json").write_text(json.dumps(words))
    linear = torch.nn.Linear(24, 48)
    state = {"llama_proj.weight": linear.weight.detach(), "llama_proj.bias": linear.bias.detach()}
    torch.save({"model": state, "epoch": 3}, home / "minigpt4.pth")
    return {"blip2": blip2, "language": home / "vicuna", "projection": home / "minigpt4.pth"}


def test_the_whole_answers_as_in_transformers(parts: dict[str, Any], tmp_path: Path) -> None:
    out = script().assemble(**parts, out=tmp_path / "whole")
    ours = load(out, device="cpu", dtype="float32")
    theirs, found = transformers.Blip2ForConditionalGeneration.from_pretrained(out, output_loading_info=True, dtype=torch.float32)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    picture = Picture(Image.linear_gradient("L").resize((90, 60)).convert("RGB"))
    one = ours.inputs.build([Message("user", "<image>\nWhat is it?")], [picture])
    assert int(one.slots.sum()) == 5 and ours.config.template == "minigpt4"
    with torch.inference_mode():
        wanted = theirs.eval()(input_ids=one.ids[None], pixel_values=normalise(one.tiles, torch.float32, "clip")).logits[0]
    assert wanted.std() > 0.3 and (all_logits(ours.model, one) - wanted).abs().max() < 1e-4


def test_the_prompt_is_minigpt4s() -> None:
    talk = [Message("user", "<image> What?"), Message("assistant", "Rice."), Message("user", "Why?")]
    template = template_named("minigpt4")
    assert text_of(render(talk, template, open_turn=True)) == (
        f"{template.default_system}###Human: <Img><image></Img> What?###Assistant: Rice.###Human: Why?###Assistant: "
    )
    learned = [piece.text for piece in render(talk, template, open_turn=True) if piece.learn]
    assert learned == ["Rice.", "###"]


def test_parts_that_do_not_fit_are_told_and_nothing_is_left(parts: dict[str, Any], tmp_path: Path) -> None:
    assemble, out = script().assemble, tmp_path / "out"
    torch.save({"llama_proj.weight": torch.zeros(48, 23), "llama_proj.bias": torch.zeros(48)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"mlp1\.1\.weight is \(48, 23\), must be \(48, 24\)"):
        assemble(**parts | {"projection": tmp_path / "other.pth"}, out=out)
    torch.save({"model": {}}, tmp_path / "empty.pth")
    with pytest.raises(CheckpointError, match=r"holds no llama_proj\.weight, llama_proj\.bias"):
        assemble(**parts | {"projection": tmp_path / "empty.pth"}, out=out)
    (tmp_path / "torn.pth").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be read"):
        assemble(**parts | {"projection": tmp_path / "torn.pth"}, out=out)
    with pytest.raises(CheckpointError, match="no vision_config"):
        assemble(**parts | {"blip2": parts["language"]}, out=out)
    assert not out.exists()
