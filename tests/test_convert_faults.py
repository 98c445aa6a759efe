"""What goes wrong when models are converted, done on purpose: each fault is caught, named, and leaves nothing behind."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from tessella import cli
from tessella.checkpoint import write
from tessella.checkpoint.adapters import AdapterSettings, save_adapter
from tessella.checkpoint.convert import Wish, convert
from tessella.checkpoint.folder import UNFINISHED
from tessella.checkpoint.layout import native_config
from tessella.checkpoint.proof import prove
from tessella.checkpoint.source import open_source
from tessella.checkpoint.weights import INDEX, Weights, write_file
from tessella.config import NATIVE_ROPE_THETA, VisionConfig, load_config
from tessella.errors import CheckpointError, ConfigError, TessellaError

INTERNLM2, LLAMA = "InternLM2ForCausalLM", "LlamaForCausalLM"
LAYER = "language_model.model.layers.1"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.tiny_folder(tmp_path / "base", LLAMA)


@pytest.fixture
def twin(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "twin"))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")


def change_json(file: Path, *path: str, to: Any) -> None:
    raw = json.loads(file.read_text())
    place = raw
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    file.write_text(json.dumps(raw))


def swap_k_and_v(state: dict[str, Tensor]) -> None:
    k, v = f"{LAYER}.self_attn.k_proj.weight", f"{LAYER}.self_attn.v_proj.weight"
    state[k], state[v] = state[v], state[k]


def nudge(state: dict[str, Tensor]) -> None:
    state["mlp1.3.bias"][5] += 1e-6


def not_a_number(state: dict[str, Tensor]) -> None:
    state["mlp1.3.bias"][5] = float("nan")


def transpose_square(state: dict[str, Tensor]) -> None:
    state[f"{LAYER}.self_attn.o_proj.weight"] = state[f"{LAYER}.self_attn.o_proj.weight"].T


def halve(state: dict[str, Tensor]) -> None:
    state["mlp1.3.bias"] = state["mlp1.3.bias"].half()


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (swap_k_and_v, "its numbers stand in"),
        (nudge, r"mlp1\.3\.bias differs in 1\.6%"),
        (not_a_number, r"mlp1\.3\.bias differs"),
        (transpose_square, r"o_proj\.weight differs"),
        (halve, "is stored as torch.float32 and torch.float16"),
    ],
)
def test_a_changed_tensor_is_found_and_named(
    base: Path, twin: Path, fault: Callable[[dict[str, Tensor]], None], told: str
) -> None:
    assert prove(open_source(base), open_source(twin)).holds
    change_tensors(twin, fault)
    proofs = prove(open_source(base), open_source(twin), mode="tensors")
    assert not proofs.holds and not proofs.config and not proofs.prompts.differing
    with pytest.raises(CheckpointError, match=told):
        proofs.require("the copy")


@pytest.mark.parametrize(
    ("architecture", "stored", "k", "v"),
    [  # rows of the tiny wqkv: two groups of two query heads, a key, a value, 16 each; of qkv_proj: 64 of q, 32 of k, 32 of v
        (INTERNLM2, "attention.wqkv", slice(96, 112), slice(112, 128)),
        ("Phi3ForCausalLM", "self_attn.qkv_proj", slice(64, 96), slice(96, 128)),
    ],
)
def test_k_and_v_swapped_within_a_fused_tensor_are_found(
    tmp_path: Path, architecture: str, stored: str, k: slice, v: slice
) -> None:
    base = tiny.tiny_folder(tmp_path / "base", architecture)
    native = convert(base, tmp_path / "native", Wish(to="native", proof="tensors")).folder
    twin = Path(shutil.copytree(base, tmp_path / "twin"))

    def swap(state: dict[str, Tensor]) -> None:
        rows = state[f"{LAYER}.{stored}.weight"]
        rows[k], rows[v] = rows[v].clone(), rows[k].clone()

    change_tensors(twin, swap)
    for intact in (base, native):
        proofs = prove(open_source(intact), open_source(twin), mode="tensors")
        assert not proofs.holds and len(proofs.tensors.differing) == 2
        for name, told in zip(("k_proj", "v_proj"), proofs.tensors.differing, strict=True):
            assert f"{LAYER}.self_attn.{name}.weight differs" in told
        assert ("its numbers stand in" in proofs.tensors.differing[0]) == (architecture != INTERNLM2)  # all of k, or one head


@pytest.mark.parametrize(
    ("file", "path", "to", "told"),
    [
        ("config.json", ("llm_config", "rope_theta"), 5e5, "language.rope_theta is 10000.0 and 500000.0"),
        ("config.json", ("template",), "Hermes-2", "prompt 1 differs from place"),
        ("config.json", ("max_dynamic_patch",), 1, "max_tiles is 12 and 1"),
        ("config.json", ("vision_config", "layer_norm_eps"), 1e-5, "vision.norm_eps"),
        ("tokenizer_config.json", ("add_bos_token",), True, "ids differ"),
    ],
)
def test_a_changed_config_template_or_tokenizer_is_found(
    tmp_path: Path, file: str, path: tuple[str, ...], to: Any, told: str
) -> None:
    architecture = INTERNLM2 if "bos" in path[-1] else LLAMA
    base = tiny.tiny_folder(tmp_path / "base", architecture)
    if architecture == INTERNLM2:
        to = False
    twin = Path(shutil.copytree(base, tmp_path / "twin"))
    change_json(twin / file, *path, to=to)
    proofs = prove(open_source(base), open_source(twin))
    assert not proofs.holds and not proofs.tensors.differing
    assert any(told in words for _, words, equal in proofs.rows() if equal is False)


@pytest.fixture(params=[name for name in tiny.FAMILIES if tiny.family(name).language.rope_theta != NATIVE_ROPE_THETA])
def published(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of each family that is not published with the base of the rotary angles that transformers fills in."""
    config = tiny.family(request.param)
    return tiny.tiny_folder(tmp_path / "published", config.language.architecture, config=config)


def test_a_rope_base_of_1e4_is_found_in_every_family_that_has_another(published: Path, tmp_path: Path) -> None:
    told = f"language.rope_theta is {load_config(published).language.rope_theta} and 10000.0"
    native = convert(published, tmp_path / "native", Wish(to="native", proof="tensors")).folder
    twin = Path(shutil.copytree(published, tmp_path / "twin"))
    change_json(twin / "config.json", "llm_config", "rope_theta", to=NATIVE_ROPE_THETA)
    for path in (("rope_theta",), ("rope_parameters", "rope_theta")):
        change_json(native / "config.json", "text_config", *path, to=NATIVE_ROPE_THETA)
    for spoilt in (twin, native):
        proofs = prove(open_source(published), open_source(spoilt), mode="tensors")
        assert not proofs.holds and proofs.config == (told,) and not proofs.tensors.differing
    # and it is no mere word: the answers are others
    proofs = prove(open_source(published), open_source(twin), mode="logits")
    assert proofs.logits is not None and not proofs.logits.holds and proofs.largest_difference > 0.1


def test_a_native_config_without_its_rope_base_is_found(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tutorial's readers lost: the reader then fills in 1e4, and nothing is said."""

    def forgetful(*args: Any, **options: Any) -> dict[str, Any]:
        raw = native_config(*args, **options)
        del raw["text_config"]["rope_theta"], raw["text_config"]["rope_parameters"]
        return raw

    monkeypatch.setattr(write, "native_config", forgetful)
    with pytest.raises(CheckpointError, match=r"rope_theta is .* and 10000\.0"):
        convert(published, tmp_path / "out", Wish(to="native"))
    assert not (tmp_path / "out").exists()


def test_a_native_folder_that_lost_its_template_is_found(base: Path, tmp_path: Path) -> None:
    native = convert(base, tmp_path / "native", Wish(to="native")).folder
    raw = json.loads((native / "config.json").read_text())
    del raw["tessella"]
    (native / "config.json").write_text(json.dumps(raw))
    proofs = prove(open_source(base), open_source(native), mode="tensors")
    assert not proofs.holds and proofs.prompts.differing and any("template" in word for word in proofs.config)


def test_what_the_writer_does_wrong_is_found_before_the_folder_gets_its_name(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof reads the file again: a fault between the tensor and the disk is no fault of ours to pass on."""

    def careless(path: Path, entries: Any, advance: Any) -> str:
        by_name = {entry.name: entry for entry in entries}
        k, v = f"{LAYER}.self_attn.k_proj.weight", f"{LAYER}.self_attn.v_proj.weight"
        others = [by_name[{k: v, v: k}.get(entry.name, entry.name)] for entry in entries]
        swapped = [replace(entry, make=other.make, strips=other.strips) for entry, other in zip(entries, others, strict=True)]
        return write_file(path, swapped, advance)

    monkeypatch.setattr(write, "write_file", careless)
    with pytest.raises(CheckpointError, match="its numbers stand in"):
        convert(base, tmp_path / "out", Wish(to="native"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_verify_prints_a_table_and_its_exit_code_tells(base: Path, twin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = base.parent / "report.json"
    assert cli.main(["verify", str(base), str(twin), "--json", str(report)]) == 0
    assert json.loads(report.read_text())["proof"]["holds"] is True and "DIFFERS" not in capsys.readouterr().out
    change_tensors(twin, swap_k_and_v)
    assert cli.main(["verify", str(base), str(twin), "--proof", "tensors", "--json", str(report)]) == 1
    assert json.loads(report.read_text())["differs"] is True and "DIFFERS" in capsys.readouterr().out
    assert cli.main(["verify", str(base), str(base / "nowhere")]) == 2


# ---- folders that cannot be read


def missing_tensor(folder: Path) -> None:
    change_tensors(folder, lambda state: state.pop("mlp1.1.weight"))


def transposed(folder: Path) -> None:
    change_tensors(folder, lambda state: state.update({"mlp1.1.weight": state["mlp1.1.weight"].T}))


def truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def cut_in_its_header(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:1000])


def quantised(folder: Path) -> None:
    change_tensors(folder, lambda state: state.update({"mlp1.1.weight": state["mlp1.1.weight"].to(torch.int8)}))


def missing_shard(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"mlp1.1.weight": "model-00001-of-00002.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))


def mixed_names(folder: Path) -> None:
    change_tensors(folder, lambda state: state.update({"multi_modal_projector.linear_1.weight": state.pop("mlp1.1.weight")}))


def native_config_only(folder: Path) -> None:
    native = convert(folder, folder.parent / "native", Wish(to="native", proof="tensors")).folder
    shutil.copy(native / "config.json", folder / "config.json")


def two_in_one(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def unknown_language_model(folder: Path) -> None:
    change_json(folder / "config.json", "llm_config", "architectures", to=["MambaForCausalLM"])


def unknown_model(folder: Path) -> None:
    change_json(folder / "config.json", "architectures", to=["PaliGemmaForConditionalGeneration"])


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (missing_tensor, "1 are missing: mlp1.1.weight"),
        (transposed, "mlp1.1.weight is"),
        (truncated, r"not a whole safetensors file \(it holds 6\d\d,\d\d\d of 6\d\d,\d\d\d bytes\)"),
        (cut_in_its_header, r"not a whole safetensors file \(it holds 1,000 bytes and ends within its header\)"),
        (quantised, "quantised weights are not read"),
        (missing_shard, "model-00001-of-00002.safetensors"),
        (mixed_names, "mixes two layouts"),
        (native_config_only, "its config.json is native, its tensors are official"),
        (two_in_one, "both an adapter and a model"),
        (unknown_language_model, "MambaForCausalLM.*InternLM2ForCausalLM"),
        (unknown_model, "PaliGemmaForConditionalGeneration.*InternVLChatModel"),
        (no_config, "neither config.json nor adapter_config.json"),
    ],
)
def test_a_folder_that_is_no_whole_model_is_told(base: Path, tmp_path: Path, fault: Callable[[Path], None], told: str) -> None:
    fault(base)
    with pytest.raises(TessellaError, match=told):
        convert(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_gone_or_of_another_kind_is_told(tmp_path: Path) -> None:
    (tmp_path / "words.safetensors").write_text("<html>Not Found</html>")
    for name in ("gone.safetensors", "words.safetensors"):
        with pytest.raises(CheckpointError, match=f"{name} is not a whole safetensors file"):
            Weights([tmp_path / name])


def random_adapter(base: Path, place: Path, module: str, shape: tuple[int, int]) -> Path:
    state = {f"{module}.lora_A.weight": torch.randn(4, shape[1]), f"{module}.lora_B.weight": torch.randn(shape[0], 4)}
    return save_adapter(place, state, AdapterSettings(str(base), 4, 8))


def test_adapters_that_do_not_belong_are_told(base: Path, tmp_path: Path) -> None:
    nowhere = random_adapter(base, tmp_path / "nowhere", "language_model.model.layers.1.mixer.in_proj", (64, 64))
    with pytest.raises(CheckpointError, match=r"1 of 1 tensors .* have no place in the base"):
        convert(nowhere, tmp_path / "out")
    wider = random_adapter(base, tmp_path / "wider", f"{LAYER}.self_attn.o_proj", (128, 64))
    with pytest.raises(CheckpointError, match="wrong shapes"):
        convert(wider, tmp_path / "out")
    lost = random_adapter(tmp_path / "gone", tmp_path / "lost", f"{LAYER}.self_attn.o_proj", (64, 64))
    with pytest.raises(CheckpointError, match=r"gone.*--base"):
        convert(lost, tmp_path / "out")


def test_out_is_never_in_nor_around_what_is_read(base: Path, tmp_path: Path) -> None:
    adapter = random_adapter(base, tmp_path / "adapter", f"{LAYER}.self_attn.o_proj", (64, 64))
    for source, out in ((base, base / "out"), (base, base), (adapter, base / "deep" / "out"), (adapter, adapter / "out")):
        with pytest.raises(CheckpointError, match=r"which is read from|not empty"):
            convert(source, out)
    inner = tiny.tiny_folder(tmp_path / "empty" / "model", LLAMA)
    with pytest.raises(CheckpointError, match="not empty"):
        convert(inner, tmp_path / "empty")
    (tmp_path / "link").symlink_to(base)
    with pytest.raises(CheckpointError, match="lies in"):
        convert(base, tmp_path / "link" / "out")
    assert sorted(path.name for path in base.iterdir()) == sorted(
        path.name for path in tiny.tiny_folder(tmp_path / "b", LLAMA).iterdir()
    )


def test_a_wish_for_a_type_or_place_that_cannot_be_is_told(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="int8"):
        convert(base, tmp_path / "out", Wish(dtype="int8"))
    with pytest.raises(CheckpointError, match="known are"):
        convert(base / "config.json", tmp_path / "out")


# ---- large folders


def test_a_stopped_conversion_is_gone_on_with(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    def stopped(path: Path, entries: Any, advance: Any) -> str:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        return write_file(path, entries, advance)

    wish = Wish(to="native", shard_bytes=10**6)
    base = tiny.tiny_folder(tmp_path / "large", LLAMA, config=wider())
    with monkeypatch.context() as patch:
        patch.setattr(write, "write_file", stopped)
        with pytest.raises(KeyboardInterrupt):
            convert(base, tmp_path / "out", wish)
    (aside,) = tmp_path.glob(".out.*.part")
    assert len(list(aside.glob("*.safetensors"))) == 2 and not (tmp_path / "out").exists()
    spoilt, kept = written
    with (aside / spoilt).open("r+b") as file:  # a disk that lost a block: its hash tells
        file.seek(-5, os.SEEK_END)
        file.write(b"spoil")
    written.clear()
    monkeypatch.setattr(
        write, "write_file", lambda path, entries, advance: written.append(path.name) or write_file(path, entries, advance)
    )
    result = convert(base, tmp_path / "out", wish)
    assert result.proof.holds and spoilt in written and kept not in written
    assert not list(tmp_path.glob(".out.*")) and not (tmp_path / "out" / UNFINISHED).exists()
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == shards and len(shards) == len(written) + 1
    assert index["metadata"]["total_size"] == Weights([tmp_path / "out" / name for name in shards]).num_bytes()


def wider() -> Any:
    config = tiny.tiny_config(LLAMA)
    language = replace(config.language, hidden_size=256, intermediate_size=512, num_heads=16)
    return replace(config, language=language)


def test_another_conversion_does_not_go_on_with_it(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop_after_writing(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tessella.checkpoint.convert.prove", stop_after_writing)
        with pytest.raises(KeyboardInterrupt):
            convert(base, tmp_path / "out", Wish(to="native"))
    assert len(list(tmp_path.glob(".out.*.part"))) == 1
    assert convert(base, tmp_path / "out", Wish(to="official")).proof.holds  # the same place, another layout
    assert not list(tmp_path.glob(".out.*"))


PEAK = """
import resource
import sys
from pathlib import Path
import torch
from tessella.checkpoint.convert import Wish, convert
torch.set_num_threads(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(sys.argv[1], sys.argv[2], Wish(to=sys.argv[3], shard_bytes=10**8))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_a_model_passes_through_little_memory(tmp_path: Path) -> None:
    """200 MB of weights, the largest tensor 8 MB: there and back in a small part of that, mapped pages counted."""
    config = tiny.tiny_config(INTERNLM2)
    language = replace(
        config.language, hidden_size=1024, intermediate_size=4096, num_heads=16, num_kv_heads=8, head_dim=64, num_layers=6
    )
    vision = VisionConfig(hidden_size=64, intermediate_size=128, num_layers=1, num_heads=2, image_size_px=56)
    base = tiny.tiny_folder(
        tmp_path / "base", INTERNLM2, config=replace(config, language=language, vision=vision), dtype=torch.bfloat16
    )
    size = (base / "model.safetensors").stat().st_size
    assert size > 180e6
    for source, out, to in ((base, tmp_path / "native", "native"), (tmp_path / "native", tmp_path / "back", "official")):
        command = [sys.executable, "-c", PEAK, str(source), str(out), to]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert int(done.stdout) < 90e6, f"{int(done.stdout) / 1e6:.0f} MB for {size / 1e6:.0f} MB"
    was = load_file(base / "model.safetensors")
    now = {name: tensor for file in (tmp_path / "back").glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert was.keys() == now.keys() and all(torch.equal(was[name], now[name]) for name in was)
