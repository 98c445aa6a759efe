"""Adapters and converting: PEFT is the oracle of the merge, and a folder that answers otherwise is not kept.

How LIMITS of verify.py were found (23 November 2026, two CPU cores): SmolLM2 with a random tower and a LoRA of rank 8 on
every linear layer. Weights stored in bfloat16: largest difference 0.07 to 0.12 of the spread when the LoRA changes the logits
by 0.02 to 0.6 of it, 0.22 when it changes them by 2.7 times the spread. Float32, tiny models: 2e-6 to 5e-6.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from tessella.checkpoint.adapters import AdapterSettings, read_adapter, save_adapter
from tessella.checkpoint.convert import Wish, convert
from tessella.checkpoint.folder import MANIFEST
from tessella.checkpoint.lowrank import Adapter, fit
from tessella.checkpoint.read import find_model, load, load_model
from tessella.checkpoint.source import Origin
from tessella.checkpoint.verify import compare, logits_on, probes
from tessella.errors import CheckpointError, ConfigError
from tessella.model.vision_language import VisionLanguageModel

RANK, ALPHA = 4, 8
LLAMA, INTERNLM2 = "LlamaForCausalLM", "InternLM2ForCausalLM"


def lora_state(model: VisionLanguageModel, *, scale: float = 0.3, ends: str = "proj.weight") -> dict[str, Tensor]:
    """A random LoRA on the decoder's linear layers."""
    chance = torch.Generator().manual_seed(1)
    state = {}
    for name, weight in model.named_parameters():
        if name.startswith("language_model.model.layers") and name.endswith(ends):
            module = name.removesuffix(".weight")
            state[f"{module}.lora_A.weight"] = torch.randn(RANK, weight.shape[1], generator=chance) / 8
            state[f"{module}.lora_B.weight"] = scale * torch.randn(weight.shape[0], RANK, generator=chance) / 8
    return state


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.tiny_folder(tmp_path / "base", LLAMA)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    model, _ = load_model(base)
    state = lora_state(model) | {name: weight + 0.05 for name, weight in model.mlp1.named_parameters(prefix="mlp1")}
    return save_adapter(tmp_path / "adapter", state, AdapterSettings(str(base), RANK, ALPHA, modules_to_save=("mlp1",)))


def change_config(adapter: Path, **fields: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_state(adapter: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    state = load_file(adapter / "adapter_model.safetensors")
    change(state)
    save_file(state, adapter / "adapter_model.safetensors")


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_converted_folder_answers_like_base_and_adapter(tmp_path: Path, architecture: str, sharded: bool) -> None:
    base = tiny.tiny_folder(tmp_path / "base", architecture, sharded=sharded)
    state = lora_state(load_model(base)[0])
    save_adapter(tmp_path / "adapter", state, AdapterSettings(str(base), RANK, ALPHA))
    result = convert(tmp_path / "adapter", tmp_path / "out")
    logits = result.proof.logits
    assert logits is not None and logits.largest_difference < 1e-4 and logits.equal_argmax == 1 and logits.prompts == 4
    assert result.proof.holds and result.merged_pairs == result.proof.tensors.merged == 14
    assert result.as_json()["largest_logit_difference"] == result.proof.largest_difference
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {**written, "torch_dtype": None} == {**json.loads((base / "config.json").read_text()), "torch_dtype": None}
    loaded = load(tmp_path / "out", dtype="float32", device="cpu")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert set(loaded.stop_ids) <= set(generation["eos_token_id"])
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_our_merge_equals_pefts_own(base: Path, adapter: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is the oracle of this test; it is in the train extra")
    model, _ = load_model(base)
    theirs = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    convert(adapter, tmp_path / "out")
    ours, _ = load_model(tmp_path / "out")
    for (name, found), (_, wanted) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.allclose(found, wanted, atol=1e-6, rtol=0), name


def test_an_adapter_that_peft_wrote_is_read_with_its_patterns(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is the oracle of this test; it is in the train extra")
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=r"language_model\.model\.layers\.\d+\.(self_attn\.(q|k|v)_proj|mlp\.up_proj)",
        rank_pattern={"q_proj": 2},
        alpha_pattern={r"layers.1.mlp.up_proj": 3},
        use_rslora=True,
        modules_to_save=["mlp1"],
        init_lora_weights=False,
    )
    model = peft.get_peft_model(load_model(base)[0], config)
    model.save_pretrained(tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "out", origin=Origin(str(base)))
    theirs = model.merge_and_unload()
    for (name, found), (_, wanted) in zip(
        load_model(tmp_path / "out")[0].named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert torch.allclose(found, wanted, atol=1e-6, rtol=0), name


def test_an_adapter_on_internlm2s_fused_rows_is_split_by_the_same_grouping(tmp_path: Path) -> None:
    base = tiny.tiny_folder(tmp_path / "base", INTERNLM2)
    module = "language_model.model.layers.0.attention.wqkv"
    a, b = torch.randn(RANK, 64) / 8, torch.randn(128, RANK) / 8
    state = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    save_adapter(tmp_path / "adapter", state, AdapterSettings(str(base), RANK, ALPHA))
    convert(tmp_path / "adapter", tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors")[f"{module}.weight"] for folder in (base, tmp_path / "out"))
    assert torch.allclose(after, before + ALPHA / RANK * b @ a, atol=1e-5)


def test_a_loaded_adapter_answers_like_the_converted_folder(base: Path, adapter: Path, tmp_path: Path) -> None:
    convert(adapter, tmp_path / "out")
    merged = load(tmp_path / "out", dtype="float32", device="cpu")
    direct = load(adapter, dtype="float32", device="cpu")  # names its own base
    named = load(base, adapter=adapter, dtype="float32", device="cpu")
    prompts = probes(merged.inputs)
    wanted = logits_on(merged.model, prompts)
    for other in (direct, named):
        assert compare(wanted, logits_on(other.model, prompts), torch.float32).largest_difference == 0
    untaught = logits_on(load(base, dtype="float32", device="cpu").model, prompts)
    assert compare(wanted, untaught, torch.float32).largest_difference > 0.1  # or this test could not fail


def test_bfloat16_is_stored_as_the_base_and_float32_when_asked(tmp_path: Path) -> None:
    base = tiny.tiny_folder(tmp_path / "base", INTERNLM2, dtype=torch.bfloat16)
    state = lora_state(load_model(base)[0])
    save_adapter(tmp_path / "adapter", state, AdapterSettings(str(base), RANK, ALPHA))
    result = convert(tmp_path / "adapter", tmp_path / "out")
    assert result.stored == "bfloat16" and result.proof.logits is not None and 1e-2 < result.proof.logits.limit < 0.1
    assert {weight.dtype for weight in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    wide = convert(tmp_path / "adapter", tmp_path / "wide", Wish(dtype="float32"))
    assert wide.stored == "float32" and wide.proof.largest_difference < 1e-4


def test_an_adapter_too_faint_for_bfloat16_is_refused_and_kept_in_float32(tmp_path: Path) -> None:
    base = tiny.tiny_folder(tmp_path / "base", LLAMA, dtype=torch.bfloat16)
    state = lora_state(load_model(base)[0], scale=1e-3)
    save_adapter(tmp_path / "adapter", state, AdapterSettings(str(base), RANK, ALPHA))
    with pytest.raises(CheckpointError, match="loses the adapter"):
        convert(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert convert(tmp_path / "adapter", tmp_path / "out", Wish(dtype="float32")).proof.holds


def test_a_wrong_merge_is_not_kept(base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classic faults: rows in another order, a forgotten scale, a forgotten tensor."""
    whole = Adapter.merged
    wrong = "language_model.model.layers.1.self_attn.k_proj.weight"
    faults: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda new, _: new.flip(0),
        lambda new, old: (new + old) / 2,
        lambda _, old: old,
    ]
    for fault in faults:

        def merged(self, name, weight, dtype=None, fault=fault):  # type: ignore[no-untyped-def]
            new = whole(self, name, weight, dtype)
            return fault(new, weight) if name == wrong else new

        with monkeypatch.context() as patch:
            patch.setattr(Adapter, "merged", merged)
            with pytest.raises(CheckpointError, match=r"k_proj\.weight is not what the merge gives"):
                convert(adapter, tmp_path / "out", Wish(proof="tensors"))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_untrained_adapter_is_told(base: Path, tmp_path: Path) -> None:
    state = lora_state(load_model(base)[0], scale=0.0)
    save_adapter(tmp_path / "adapter", state, AdapterSettings(str(base), RANK, ALPHA))
    with pytest.raises(CheckpointError, match="changes nothing"):
        convert(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_without_a_place_or_of_another_shape_are_named(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = tiny.tiny_folder(tmp_path / "other", "Qwen2ForCausalLM")
    key = "base_model.model.language_model.model.layers.7.self_attn.q_proj"

    def stray(state: dict[str, Tensor]) -> None:
        state[f"{key}.lora_A.weight"], state[f"{key}.lora_B.weight"] = torch.zeros(RANK, 64), torch.zeros(64, RANK)

    change_state(adapter, stray)
    with pytest.raises(CheckpointError, match=r"1 of 21 .*layers\.7\.self_attn\.q_proj"):
        convert(adapter, tmp_path / "out", origin=Origin(str(other)))

    def mend(state: dict[str, Tensor]) -> None:
        del state[f"{key}.lora_A.weight"], state[f"{key}.lora_B.weight"]

    change_state(adapter, mend)
    shapes = {name: (1, 1) for name, _ in load_model(base)[0].named_parameters()}
    with pytest.raises(CheckpointError, match="wrong shapes"):
        fit(read_adapter(adapter), shapes, tiny.tiny_config(LLAMA).language)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"r": 5}, "says rank 5"),
        ({"lora_alpha": None}, "no lora_alpha"),
        ({"base_model_name_or_path": "/nowhere/at/all"}, "name the base yourself"),
        ({"base_model_name_or_path": None}, "does not say which base"),
    ],
)
def test_an_adapter_that_we_cannot_honour_is_refused(
    adapter: Path, tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    change_config(adapter, **fields)
    with pytest.raises(CheckpointError, match=message):
        convert(adapter, tmp_path / "out")


def test_broken_adapter_folders_are_told(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="needs no base"):
        convert(base, tmp_path / "out", origin=Origin(str(base)))

    def halve(state: dict[str, Tensor]) -> None:
        del state[next(name for name in state if "lora_B" in name)]

    change_state(adapter, halve)
    with pytest.raises(CheckpointError, match="do not both stand"):
        convert(adapter, tmp_path / "out")
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        find_model(adapter)


def test_only_our_own_unchanged_folder_is_written_over_and_only_when_forced(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="not made by tessella"):
        convert(adapter, out, Wish(force=True))
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    (out / "thesis.txt").unlink()
    convert(adapter, out)  # an empty folder is free
    with pytest.raises(CheckpointError, match="--force"):
        convert(adapter, out)
    assert convert(adapter, out, Wish(force=True)).proof.holds
    (out / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"changed since we made it \(notes\.txt\)"):
        convert(adapter, out, Wish(force=True))
    (out / "notes.txt").unlink()
    (out / "config.json").write_text((out / "config.json").read_text().replace("true", "True"))
    with pytest.raises(CheckpointError, match=r"changed since we made it \(config\.json\)"):
        convert(adapter, out, Wish(force=True))
    assert (out / MANIFEST).is_file()


def test_a_place_or_type_that_cannot_be_is_told_before_any_work(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="does not let us write"):
        convert(adapter, tmp_path / "file" / "out")
    with pytest.raises(ConfigError, match="int8"):
        convert(adapter, tmp_path / "out", Wish(dtype="int8"))


def test_base_or_adapter_are_never_the_place_to_write_to(base: Path, adapter: Path) -> None:
    for place in (base, adapter):
        with pytest.raises(CheckpointError):
            convert(adapter, place, Wish(force=True))
    assert load_model(base) and read_adapter(adapter)
