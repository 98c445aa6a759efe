"""An adapter on a base that it was not taught on: told by shapes, by the published name, and by the weights themselves."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from taught import ALPHA, RANK, random_pairs
from tessella.checkpoint.adapters import AdapterSettings, save_adapter
from tessella.checkpoint.convert import Wish, convert
from tessella.checkpoint.fingerprint import FILE
from tessella.checkpoint.read import base_fingerprint, load, load_model
from tessella.checkpoint.source import Origin
from tessella.errors import CheckpointError
from tessella.serving import load_adapter

INTERNLM2 = "InternLM2ForCausalLM"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.tiny_folder(tmp_path / "base", INTERNLM2, dtype=torch.bfloat16)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    settings = AdapterSettings(str(base), RANK, ALPHA, fingerprint=base_fingerprint(str(base)))
    return save_adapter(tmp_path / "adapter", random_pairs(load_model(base)[0]), settings)


def test_other_weights_of_the_same_shapes_are_refused_everywhere(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = tiny.tiny_folder(tmp_path / "other", INTERNLM2, seed=5, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"taught on .*base.* the weights of .*other are not those"):
        convert(adapter, tmp_path / "out", origin=Origin(str(other)))
    with pytest.raises(CheckpointError, match="are not those"):
        load(other, adapter=adapter, device="cpu")
    with pytest.raises(CheckpointError, match="are not those"):
        load_adapter(None, load(other, device="cpu"), "food", adapter)  # type: ignore[arg-type]  # it never comes to an engine
    merged = convert(adapter, tmp_path / "merged", Wish(proof="tensors")).folder
    with pytest.raises(CheckpointError, match="merged into it already"):
        convert(adapter, tmp_path / "out", origin=Origin(str(merged)))
    (adapter / FILE).unlink()  # the way out that the message names
    assert convert(adapter, tmp_path / "out", Wish(proof="tensors"), Origin(str(other))).proof.holds


def test_the_same_weights_elsewhere_are_the_same_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    native = convert(base, tmp_path / "native", Wish(to="native")).folder
    wide = convert(base, tmp_path / "wide", Wish(dtype="float32", proof="tensors")).folder
    again = convert(adapter, tmp_path / "again", Wish(to="adapter", names="native"), Origin(str(native))).folder
    assert json.loads((again / FILE).read_text()) == json.loads((adapter / FILE).read_text())
    for place in (native, wide):
        assert base_fingerprint(str(place)) == base_fingerprint(str(base))
    assert load(wide, adapter=adapter, device="cpu").folder == wide


def test_another_published_model_is_refused_by_its_name(tmp_path: Path) -> None:
    bases = [tiny.tiny_folder(tmp_path / name, INTERNLM2) for name in ("InternVL2-2B", "InternVL2_5-2B")]
    adapter = save_adapter(
        tmp_path / "adapter", random_pairs(load_model(bases[0])[0]), AdapterSettings("OpenGVLab/InternVL2-2B@main", RANK, ALPHA)
    )
    with pytest.raises(CheckpointError, match=r"InternVL2_5-2B is another model; give InternVL2-2B as its base"):
        convert(adapter, tmp_path / "out", origin=Origin(str(bases[1])))
    assert convert(adapter, tmp_path / "out", Wish(proof="tensors"), Origin(str(bases[0]))).proof.holds


def test_a_base_of_another_shape_and_a_broken_record_are_told(adapter: Path, tmp_path: Path) -> None:
    config = tiny.tiny_config(INTERNLM2)
    wider = replace(config, language=replace(config.language, intermediate_size=128))
    other = tiny.tiny_folder(tmp_path / "other", INTERNLM2, config=wider)
    with pytest.raises(CheckpointError, match=r"wrong shapes.*give that base"):
        convert(adapter, tmp_path / "out", origin=Origin(str(other)))
    (adapter / FILE).write_text("[]")
    with pytest.raises(CheckpointError, match=r"tessella_base\.json is broken"):
        convert(adapter, tmp_path / "out")
