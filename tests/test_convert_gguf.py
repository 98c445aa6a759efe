"""GGUF for llama.cpp: what lies in the files is the model, moved as llama.cpp wants it; what was not checked there is refused.

llama.cpp itself is asked in bench/llama_cpp.py (results/llama_cpp.md); here the files are read with its own Python package.
"""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import tiny
from taught import ALPHA, RANK, random_pairs
from tessella import cli
from tessella.checkpoint.adapters import AdapterSettings, save_adapter
from tessella.checkpoint.convert import Wish, convert
from tessella.checkpoint.gguf_tables import Named
from tessella.checkpoint.read import load_model
from tessella.errors import CheckpointError

INTERNLM2, QWEN2, QWEN3 = "InternLM2ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"
GGUF = Wish(to="gguf")


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(str(path)).tensors}


@pytest.mark.parametrize("architecture", [INTERNLM2, QWEN2, QWEN3])
def test_both_files_hold_the_model(tmp_path: Path, architecture: str) -> None:
    base = tiny.tiny_folder(tmp_path / "base", architecture)
    result = convert(base, tmp_path / "out", GGUF)
    assert result.proof.holds and result.proof.tensors.equal == len(list(load_model(base)[0].parameters()))
    language, tower = tensors(tmp_path / "out" / "model.gguf"), tensors(tmp_path / "out" / "mmproj.gguf")
    model = dict(load_model(base)[0].named_parameters())
    assert len(language) + len(tower) == len(model)
    q = model["language_model.model.layers.1.self_attn.q_proj.weight"].detach()
    if architecture == INTERNLM2:  # neighbours of a head of 16: number 2 i is i, number 2 i + 1 is i + 8
        order = [head * 16 + half * 8 + i for head in range(4) for i in range(8) for half in range(2)]
        q = q[order]
    assert np.array_equal(language["blk.1.attn_q.weight"], q.numpy())
    places = model["vision_model.embeddings.position_embedding"].detach()[0]
    assert np.array_equal(tower["v.position_embd.weight"], torch.cat([places[1:], places[:1]]).numpy())
    fields = gguf.GGUFReader(str(tmp_path / "out" / "model.gguf")).fields
    names = fields["tokenizer.ggml.tokens"].contents()
    assert len(names) == len(language["token_embd.weight"]) and names[tiny.tiny_tokenizer().token_to_id("<img>")] == "<img>"
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"


def test_bfloat16_stays_and_an_adapter_is_merged(tmp_path: Path) -> None:
    base = tiny.tiny_folder(tmp_path / "base", INTERNLM2, dtype=torch.bfloat16)
    save_adapter(tmp_path / "adapter", random_pairs(load_model(base)[0], tower=True), AdapterSettings(str(base), RANK, ALPHA))
    result = convert(tmp_path / "adapter", tmp_path / "out", GGUF)
    assert result.stored == "bfloat16" and result.proof.holds and result.proof.tensors.merged > 14
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(str(tmp_path / "out" / "model.gguf")).tensors}
    assert kinds == {"BF16", "F32"}
    wide = convert(tmp_path / "adapter", tmp_path / "wide", replace(GGUF, dtype="float32"))
    assert wide.stored == "float32" and wide.proof.tensors.kept == pytest.approx(1, abs=1e-4)


def test_rows_that_were_not_moved_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.tiny_folder(tmp_path / "base", INTERNLM2)
    with monkeypatch.context() as patch:
        patch.setattr(Named, "to_theirs", lambda self, tensor: tensor.reshape(-1, 32) if "position" in self.ours else tensor)
        with pytest.raises(CheckpointError, match=r"q_proj\.weight differs"):
            convert(base, tmp_path / "out", GGUF)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("Phi-3", "a Phi3 decoder could not be checked"),
        ("Llama 3.1", "stretched rotary angles"),
        ("Yi", "InternViT-6B"),
        ("Mini-InternVL", "select_layer -2"),
    ],
)
def test_a_family_that_was_not_checked_is_refused(
    tmp_path: Path, family: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.family(family)
    base = tiny.tiny_folder(tmp_path / "base", config.language.architecture, config=config)
    assert cli.main(["convert", str(base), str(tmp_path / "out"), "--to", "gguf"]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()
