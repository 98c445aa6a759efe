"""XTuner's .pth: merged like by hand, opened without running code, refused by name when there is code in it."""

import io
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tiny
from taught import XTUNER_CONFIG, merged_by_hand, official_pairs, require_equal, xtuner_state
from tessella.checkpoint.adapters import read_adapter
from tessella.checkpoint.convert import Wish, convert
from tessella.checkpoint.proof import prove
from tessella.checkpoint.source import Origin, open_source
from tessella.checkpoint.xtuner import lora_scales
from tessella.errors import CheckpointError


@pytest.fixture
def internlm2(tmp_path: Path) -> Path:
    return tiny.tiny_folder(tmp_path / "base", "InternLM2ForCausalLM")


BUFFER_MODULE = "mmengine.logging.history_buffer"


def message_hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The logger's part of a checkpoint, under the names that mmengine gives it, with its own methods in its state."""

    def mean(self: Any) -> float:
        return float(self.log_history.mean())

    def state_of(self: Any) -> dict[str, Any]:
        return {"log_history": np.array([1.5, 2.5]), "statistics_methods": {"mean": type(self).mean}}

    mean.__qualname__, mean.__module__ = "HistoryBuffer.mean", BUFFER_MODULE
    buffer = type("HistoryBuffer", (), {"__module__": BUFFER_MODULE, "mean": mean, "__getstate__": state_of})
    for name in ("mmengine", "mmengine.logging", BUFFER_MODULE):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules[BUFFER_MODULE], "HistoryBuffer", buffer, raising=False)
    return {"log_scalars": {"loss": buffer()}, "runtime_info": {"lr": np.float64(3e-5)}}


@pytest.mark.parametrize("as_folder", [False, True])
def test_xtuners_pth_is_merged_like_by_hand(
    internlm2: Path, tmp_path: Path, as_folder: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = official_pairs(internlm2)
    assert any(name.startswith("language_model.output") for name in pairs)  # XTuner adapts the head, too
    saved = {"meta": {"seed": None}, "message_hub": message_hub(monkeypatch), "param_schedulers": [{"last_step": 640}]}
    path = tmp_path / "iter_640.pth"
    if as_folder:
        path.mkdir()
        torch.save({**saved, "module": xtuner_state(pairs, internlm2), "ds_version": "0.15"}, path / "mp_rank_00_model_states.pt")
    else:
        torch.save({**saved, "state_dict": xtuner_state(pairs, internlm2)}, path)
    (tmp_path / "config.py").write_text(XTUNER_CONFIG)
    result = convert(path, tmp_path / "out", origin=Origin(str(internlm2), xtuner_config=tmp_path / "config.py"))
    assert result.kind == "xtuner" and result.proof.holds
    tower = {name: tensor for name, tensor in pairs.items() if name.startswith("vision_model.")}
    language = {name: tensor for name, tensor in pairs.items() if name not in tower}
    wanted = merged_by_hand(internlm2, language, 8 / 4)
    wanted |= {n: t for n, t in merged_by_hand(internlm2, tower, 16 / 4).items() if n.startswith("vision_model.")}
    wanted |= {name: tensor + 0.05 for name, tensor in wanted.items() if name.startswith("mlp1.")}
    require_equal(load_file(tmp_path / "out" / "model.safetensors"), wanted)
    by_flag = Origin(str(internlm2), lora_alpha=8, tower_lora_alpha=16)
    adapter = convert(path, tmp_path / "adapter", Wish(to="adapter", names="official"), by_flag)
    assert adapter.proof.holds and read_adapter(tmp_path / "adapter").base == str(internlm2)
    assert prove(open_source(tmp_path / "adapter"), open_source(tmp_path / "out"), mode="tensors").holds


def test_the_config_is_read_as_text_and_never_run() -> None:
    scales = lora_scales(XTUNER_CONFIG, "config.py")
    assert scales["language"].alpha == 8 and scales["language"].rank == 4 and scales["tower"].alpha == 16
    dumped = lora_scales('model = {"llm_lora": {"lora_alpha": 256, "r": 128, "type": "peft.LoraConfig"}}', "dumped.py")
    assert dumped["language"].alpha == 256 and "tower" not in dumped
    for text, told in (("model = dict(", "no Python text"), ("model = dict()", "names no lora_alpha")):
        with pytest.raises(CheckpointError, match=told):
            lora_scales(text, "config.py")
    with pytest.raises(CheckpointError, match="DoRA"):
        lora_scales("model = dict(llm_lora=dict(r=4, lora_alpha=8, use_dora=True))", "config.py")


class _Mine:
    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, ("opened-by-a-pickle", "w")


def test_a_pickle_with_code_in_it_is_refused_by_name(internlm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": xtuner_state({}, internlm2), "meta": _Mine()}, tmp_path / "evil.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"state_dict": _Mine()}))
    (tmp_path / "oldest.pth").write_bytes(pickle.dumps({"state_dict": _Mine()}, protocol=2))
    buffer = io.BytesIO()
    torch.save({"state_dict": _Mine()}, buffer, _use_new_zipfile_serialization=False)
    (tmp_path / "older.pth").write_bytes(buffer.getvalue())
    # numbers behind the pickle that read as one more operation, of so many bytes that no memory holds them
    (tmp_path / "numbers.pth").write_bytes(pickle.dumps({"state_dict": _Mine()}) + b"\x8e" + bytes(7) + b"\x40")
    for name in ("evil.pth", "old.pth", "older.pth", "oldest.pth", "numbers.pth"):
        with pytest.raises(CheckpointError, match=r"pickle with code in it \(io\.open\), which is refused") as told:
            convert(tmp_path / name, tmp_path / "out", origin=Origin(str(internlm2)))
        assert "weights_only" not in str(told.value)  # torch advises to open it all the same
    (tmp_path / "junk.pth").write_bytes(b"not a pickle")
    with pytest.raises(CheckpointError, match=r"junk\.pth cannot be read: it is no pickle of tensors, or it is cut or damaged"):
        convert(tmp_path / "junk.pth", tmp_path / "out", origin=Origin(str(internlm2)))
    assert not (tmp_path / "opened-by-a-pickle").exists() and not (tmp_path / "out").exists()


def test_a_pth_that_lacks_something_is_told(internlm2: Path, tmp_path: Path) -> None:
    pairs = official_pairs(internlm2, tower=False)
    torch.save({"state_dict": xtuner_state(pairs, internlm2)}, tmp_path / "iter_1.pth")
    torch.save({"state_dict": {"encoder.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "iter_1.pth").read_bytes()[:5000])
    (tmp_path / "zero3").mkdir()
    (tmp_path / "zero3" / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(b"")
    base, out = Origin(str(internlm2)), tmp_path / "out"
    for name, origin, told in (
        ("iter_1.pth", Origin(), "--base"),
        ("iter_1.pth", base, "--lora-alpha"),
        ("iter_1.pth", Origin(str(internlm2), xtuner_config=tmp_path / "none.py"), "none.py"),
        ("other.pth", base, "tensors of no InternVL"),
        ("cut.pth", base, "cannot be read"),
        ("zero3", base, "zero_to_fp32"),
    ):
        with pytest.raises(CheckpointError, match=told):
            convert(tmp_path / name, out, origin=origin)
    (tmp_path / "config.py").write_text(XTUNER_CONFIG.replace("lora_r = 4", "lora_r = 8"))
    with pytest.raises(CheckpointError, match="says rank 8"):
        convert(tmp_path / "iter_1.pth", out, origin=Origin(str(internlm2), xtuner_config=tmp_path / "config.py"))
