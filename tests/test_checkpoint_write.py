"""Writing: whole or not at all, never over what is not ours, and readable by others."""

import json
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import tiny
from tessella.checkpoint import folder as folder_module
from tessella.checkpoint.folder import MANIFEST, new_folder, read_manifest, sha256_of
from tessella.checkpoint.packing import pack, read_packed, unpack, write_packed
from tessella.checkpoint.read import load_model
from tessella.checkpoint.weights import entries_of, write_file
from tessella.checkpoint.write import write_official
from tessella.errors import CheckpointError

LLAMA = "LlamaForCausalLM"
Usage = namedtuple("Usage", "total used free")


def write_again(base: Path, out: Path, **options: object) -> Path:
    model, _ = load_model(base)
    entries = entries_of({name: weight.detach() for name, weight in model.named_parameters()})
    return write_official(entries, out, model.config, end_ids=[9], base_folder=base, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_sharded_and_single_hold_the_official_tensors_bit_for_bit(tmp_path: Path, architecture: str) -> None:
    base = tiny.tiny_folder(tmp_path / "base", architecture)
    wanted = load_file(base / "model.safetensors")
    single = write_again(base, tmp_path / "single")
    sharded = write_again(base, tmp_path / "sharded", shard_bytes=100_000)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(weight.numel() * 4 for weight in wanted.values())
    assert all((sharded / shard).stat().st_size < 200_000 for shard in shards)
    found = {name: tensor for shard in shards for name, tensor in load_file(sharded / shard).items()}
    for state in (load_file(single / "model.safetensors"), found):
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_the_manifest_holds_every_files_size_and_hash(tmp_path: Path) -> None:
    out = write_again(tiny.tiny_folder(tmp_path / "base", LLAMA), tmp_path / "out")
    rows = read_manifest(out)
    assert rows.keys() == {path.name for path in out.iterdir()} - {MANIFEST}
    assert all(rows[name] == ((out / name).stat().st_size, sha256_of(out / name)) for name in rows)


def test_side_files_of_the_base_are_carried_over_untouched_and_its_config_kept(tmp_path: Path) -> None:
    base = tiny.tiny_folder(tmp_path / "base", LLAMA)
    (base / "modeling_internvl_chat.py").write_text("raise SystemExit  # never run")
    (base / "generation_config.json").write_text('{"eos_token_id": 77, "top_p": 0.8}')
    raw = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**raw, "inherited": [1], "use_llm_lora": 128}))
    out = write_again(base, tmp_path / "out")
    assert (out / "modeling_internvl_chat.py").read_text() == "raise SystemExit  # never run"
    written = json.loads((out / "config.json").read_text())
    assert written["inherited"] == [1] and written["auto_map"] == raw["auto_map"] and written["use_llm_lora"] == 0
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [9, 77], "top_p": 0.8}
    assert not (out / "adapter_config.json").exists()


@settings(deadline=None)  # each file is synced to a disk that may be busy
@given(shapes=st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=5))
def test_our_writer_is_read_by_safetensors_whatever_the_shapes(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, ...]]
) -> None:
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
    state = {f"t{i}": (torch.randn(shape) * 9).to(kinds[i % 4]) for i, shape in enumerate(shapes)}
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    assert write_file(path, entries_of(state)) == sha256_of(path)
    found = load_file(path)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) and found[name].dtype == state[name].dtype for name in state)


def test_a_full_disk_is_told_with_numbers_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.tiny_folder(tmp_path / "base", LLAMA)
    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda _: Usage(2**40, 2**40 - 2**20, 2**20))
    with pytest.raises(CheckpointError, match=r"6\d MiB are needed .* 1 MiB are free"):
        write_again(base, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_disk_that_fills_up_while_writing_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.tiny_folder(tmp_path / "base", LLAMA)
    out = write_again(base, tmp_path / "out")
    before = read_manifest(out)

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"No space left on device.*nothing was changed"):
        write_again(base, out, force=True, check=full)
    assert read_manifest(out) == before and {path.name for path in tmp_path.iterdir()} == {"base", "out"}


def test_ctrl_c_leaves_nothing_and_the_old_folder_stands(tmp_path: Path) -> None:
    def stop(_: Path) -> None:
        raise KeyboardInterrupt

    base = tiny.tiny_folder(tmp_path / "base", LLAMA)
    with pytest.raises(KeyboardInterrupt):
        write_again(base, tmp_path / "out", check=stop)
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


KILLED = """
import sys, time
from pathlib import Path
from tessella.checkpoint.folder import new_folder
with new_folder(Path(sys.argv[1]), num_bytes=0) as aside:
    (aside / "half").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_is_swept_and_was_never_taken_for_done(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"writing\n"
    with new_folder(tmp_path / "out", num_bytes=0) as aside:  # while the other still lives, its folder stays
        (aside / "whole").write_text("whole")
    assert len(list(tmp_path.glob(".out.*.part"))) == 1
    child.kill()
    child.communicate()
    time.sleep(0.1)
    with new_folder(tmp_path / "out", num_bytes=0, force=True) as aside:
        (aside / "whole").write_text("again")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert (tmp_path / "out" / "whole").read_text() == "again"


@given(rows=st.integers(1, 5), columns=st.integers(1, 7), size=st.floats(1e-6, 1e6), seed=st.integers(0, 999))
def test_packing_errs_by_half_a_step_of_each_row(rows: int, columns: int, size: float, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    matrix = size * torch.randn(rows, columns, generator=chance)
    matrix[0] = 0
    state = {"w": matrix, "conv": matrix.reshape(rows, columns, 1, 1), "bias": matrix[-1], "table": matrix[None]}
    found = unpack(pack(state))
    step = matrix.abs().amax(1, keepdim=True) / 127
    assert ((found["w"] - matrix).abs() <= 0.5001 * step + 1e-30).all()
    assert torch.equal(found["conv"].flatten(1), found["w"])
    for name in ("bias", "table"):
        assert (found[name] - state[name]).abs().max() <= 1e-3 * state[name].abs().max() + 1e-30


def test_packed_files_are_small_and_refuse_what_is_broken(tmp_path: Path) -> None:
    state = {"w": torch.randn(64, 256), "b": torch.randn(64)}
    assert write_packed(tmp_path / "x.safetensors", state) < 64 * 256 + 64 * 6 + 400
    assert read_packed(tmp_path / "x.safetensors").keys() == state.keys()
    packed = pack(state)
    del packed["w.scale"]
    with pytest.raises(CheckpointError, match=r"without w\.scale"):
        unpack(packed)
    with pytest.raises(CheckpointError, match="not finite"):
        pack({"w": torch.tensor([[1.0, float("nan")]])})


def test_a_folder_of_ours_with_a_broken_manifest_is_not_taken_for_ours(tmp_path: Path) -> None:
    out = write_again(tiny.tiny_folder(tmp_path / "base", LLAMA), tmp_path / "out")
    (out / MANIFEST).write_text("[]")
    with pytest.raises(CheckpointError, match="no manifest of ours"):
        write_again(tmp_path / "base", out, force=True)
    shutil.rmtree(out)
