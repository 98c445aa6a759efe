"""Every kind of IN into every layout: what comes out is the same model, and the way back gives the same bytes.

The oracles: PEFT on transformers' own class and on a stand-in with the official module names, and loops written here.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tiny
from taught import (
    ALPHA,
    RANK,
    XTUNER_CONFIG,
    merged_by_hand,
    official_pairs,
    random_pairs,
    require_equal,
    training_checkpoint,
    xtuner_state,
)
from tessella import cli
from tessella.checkpoint.adapters import AdapterSettings, read_adapter, save_adapter
from tessella.checkpoint.convert import Wish, convert
from tessella.checkpoint.proof import prove
from tessella.checkpoint.read import load, load_model
from tessella.checkpoint.source import Origin, Source, kind_of, open_source
from tessella.checkpoint.verify import logits_on, probes
from tessella.errors import CheckpointError, ConfigError

INTERNLM2, LLAMA, QWEN2, PHI3 = "InternLM2ForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM", "Phi3ForCausalLM"


def logits_of(source: Source) -> list[Tensor]:
    loaded = load(source.folder, dtype="float32", device="cpu")
    return logits_on(source.model(torch.device("cpu")), probes(loaded.inputs))


@pytest.fixture
def internlm2(tmp_path: Path) -> Path:
    return tiny.tiny_folder(tmp_path / "base", INTERNLM2)


@pytest.mark.parametrize("architecture", [INTERNLM2, QWEN2])
@pytest.mark.parametrize("sharded", [False, True])
def test_official_to_native_and_back_gives_the_same_bytes(tmp_path: Path, architecture: str, sharded: bool) -> None:
    base = tiny.tiny_folder(tmp_path / "base", architecture, dtype=torch.bfloat16, sharded=sharded)
    raw = json.loads((base / "config.json").read_text())  # what we have no field for must come back too
    raw |= {"of_the_base": [1], "llm_config": {**raw["llm_config"], "of_its_llm": None, "use_cache": False}}
    (base / "config.json").write_text(json.dumps(raw))
    there = convert(base, tmp_path / "native", Wish(to="native"))
    back = convert(tmp_path / "native", tmp_path / "back", Wish(to="official"))
    assert there.kind == "official" and back.kind == "native" and there.proof.holds and back.proof.holds
    assert there.proof.logits is None and there.proof.tensors.equal == len(open_source(base).shapes)
    was = {name: tensor for file in base.glob("*.safetensors") for name, tensor in load_file(file).items()}
    now = load_file(tmp_path / "back" / "model.safetensors")
    assert was.keys() == now.keys() and all(torch.equal(was[name], now[name]) for name in was)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads((base / "config.json").read_text())
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_an_adapter_merges_into_both_layouts_alike(internlm2: Path, tmp_path: Path) -> None:
    state = random_pairs(load_model(internlm2)[0], heads=True, tower=True)
    save_adapter(tmp_path / "adapter", state, AdapterSettings(str(internlm2), RANK, ALPHA))
    official = convert(tmp_path / "adapter", tmp_path / "official")
    native = convert(tmp_path / "adapter", tmp_path / "native", Wish(to="native"))
    assert official.proof.tensors.merged == native.proof.tensors.merged == len(state) // 2
    assert official.proof.logits is not None and official.proof.logits.largest_difference < 1e-4
    assert prove(open_source(tmp_path / "official"), open_source(tmp_path / "native"), mode="logits").holds


@pytest.mark.parametrize("architecture", [INTERNLM2, PHI3, QWEN2])
@pytest.mark.parametrize("names", ["official", "native"])
def test_an_adapter_keeps_its_effect_under_other_names_and_back(tmp_path: Path, architecture: str, names: Any) -> None:
    base = tiny.tiny_folder(tmp_path / "base", architecture)
    model = load_model(base)[0]
    state = random_pairs(model, heads=True, tower=True)
    del state["language_model.model.layers.0.self_attn.k_proj.lora_A.weight"]  # a part that was not taught
    del state["language_model.model.layers.0.self_attn.k_proj.lora_B.weight"]
    state |= {name: weight + 0.05 for name, weight in model.mlp1.named_parameters(prefix="mlp1")}
    save_adapter(tmp_path / "adapter", state, AdapterSettings(str(base), RANK, ALPHA, modules_to_save=("mlp1",)))
    # Every conversion proves its tensors; models are run once for each other form, beside the adapter as it was taught.
    there = convert(tmp_path / "adapter", tmp_path / "there", Wish(to="adapter", names=names, proof="logits"))
    back = convert(tmp_path / "there", tmp_path / "back", Wish(to="adapter", names="ours", proof="tensors"))
    assert there.proof.holds and back.proof.holds and there.proof.tensors.merged == there.merged_pairs + there.replaced_tensors
    again = prove(open_source(tmp_path / "adapter"), open_source(tmp_path / "back"), mode="logits")
    for proof in (there.proof, again):
        assert proof.holds and proof.logits is not None and proof.largest_difference < 1e-4
    wish = Wish(proof="tensors")  # each number the nearest to the exact merge, and both merges the same
    merged = [convert(tmp_path / name, tmp_path / f"{name}-merged", wish).folder for name in ("adapter", "there")]
    require_equal(*(load_file(folder / "model.safetensors") for folder in merged))


def test_parts_with_one_a_are_joined_at_their_own_rank_and_others_by_widening(internlm2: Path, tmp_path: Path) -> None:
    state = random_pairs(load_model(internlm2)[0])
    shared = "language_model.model.layers.1.self_attn"
    for part in ("k", "v"):
        state[f"{shared}.{part}_proj.lora_A.weight"] = state[f"{shared}.q_proj.lora_A.weight"].clone()
    save_adapter(tmp_path / "adapter", state, AdapterSettings(str(internlm2), RANK, ALPHA))
    convert(tmp_path / "adapter", tmp_path / "out", Wish(to="adapter", names="official"))
    pairs = read_adapter(tmp_path / "out").pairs
    assert pairs["language_model.model.layers.1.attention.wqkv"].rank == RANK
    assert pairs["language_model.model.layers.0.attention.wqkv"].rank == 3 * RANK
    raw = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert raw["rank_pattern"] == {"language_model.model.layers.0.attention.wqkv": 3 * RANK} and raw["r"] == RANK


def test_a_layer_of_which_a_part_is_held_whole_is_told(internlm2: Path, tmp_path: Path) -> None:
    """Layers that one side stores together cannot be half replaced."""
    model = load_model(internlm2)[0]
    name = "language_model.model.layers.1.self_attn.k_proj"
    state = random_pairs(model) | {f"{name}.weight": model.get_submodule(name).weight.detach() + 0.1}
    for part in "AB":
        del state[f"{name}.lora_{part}.weight"]
    save_adapter(tmp_path / "adapter", state, AdapterSettings(str(internlm2), RANK, ALPHA, modules_to_save=(name,)))
    with pytest.raises(CheckpointError, match=r"holds a part of .*wqkv.* whole, but not .*q_proj.*; convert it"):
        convert(tmp_path / "adapter", tmp_path / "out", Wish(to="adapter", names="official"))
    q = "vision_tower.encoder.layer.0.attention.q_proj"
    save_adapter(
        tmp_path / "native",
        {f"{q}.weight": torch.randn(32, 32)},
        AdapterSettings(str(internlm2), RANK, ALPHA, modules_to_save=(q,)),
    )
    with pytest.raises(CheckpointError, match=r"holds .*q_proj.* whole, but not .*k_proj.*, and they are one layer"):
        convert(tmp_path / "native", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_peft_on_transformers_own_class_answers_like_us(internlm2: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is the oracle of this test; it is in the train extra")
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of this test; it is in the test extra")
    model = load_model(internlm2)[0]
    state = random_pairs(model, heads=True, tower=True)
    state |= {name: weight + 0.05 for name, weight in model.mlp1.named_parameters(prefix="mlp1")}
    save_adapter(tmp_path / "adapter", state, AdapterSettings(str(internlm2), RANK, ALPHA, modules_to_save=("mlp1",)))
    convert(internlm2, tmp_path / "native", Wish(to="native"))
    convert(tmp_path / "adapter", tmp_path / "theirs", Wish(to="adapter", names="native"), Origin(str(tmp_path / "native")))
    theirs = transformers.InternVLForConditionalGeneration.from_pretrained(tmp_path / "native", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "theirs").eval()
    source = open_source(tmp_path / "adapter")
    prompts = probes(load(internlm2, dtype="float32", device="cpu").inputs)
    for prompt, wanted in zip(prompts, logits_of(source), strict=True):
        mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        pixels = (prompt.tiles.float() / 255 - mean) / std if len(prompt.tiles) else None
        with torch.inference_mode():
            found = theirs(input_ids=prompt.ids[None], pixel_values=pixels).logits[0]
        assert torch.allclose(found, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tower", [False, True])
def test_an_official_training_checkpoint_is_merged_and_split(internlm2: Path, tmp_path: Path, tower: bool) -> None:
    pairs = official_pairs(internlm2, tower=tower, skip=("output.weight",))
    checkpoint = training_checkpoint(internlm2, tmp_path / "checkpoint", pairs, tower=tower)
    assert kind_of(checkpoint) == "lora"
    merged = convert(checkpoint, tmp_path / "merged")
    require_equal(load_file(merged.folder / "model.safetensors"), merged_by_hand(internlm2, pairs, 2.0))
    raw = json.loads((merged.folder / "config.json").read_text())
    assert raw["use_llm_lora"] == raw["use_backbone_lora"] == 0
    split = convert(checkpoint, tmp_path / "split", Wish(to="adapter"))
    assert split.proof.holds
    was, now = load_file(internlm2 / "model.safetensors"), load_file(tmp_path / "split" / "base" / "model.safetensors")
    assert was.keys() == now.keys() and all(torch.equal(was[name], now[name]) for name in was)
    assert prove(open_source(tmp_path / "split"), open_source(checkpoint), mode="tensors").holds
    assert load(tmp_path / "split", device="cpu").folder == tmp_path / "split" / "base"  # the adapter finds its base by itself
    beside = convert(checkpoint, tmp_path / "beside", Wish(to="adapter"), Origin(str(internlm2)))
    assert beside.proof.holds and not (tmp_path / "beside" / "base").exists()


def test_a_training_checkpoint_of_another_base_or_rank_is_told(internlm2: Path, tmp_path: Path) -> None:
    pairs = official_pairs(internlm2, tower=False)
    checkpoint = training_checkpoint(internlm2, tmp_path / "checkpoint", pairs, tower=False)
    other = tiny.tiny_folder(tmp_path / "other", INTERNLM2, seed=5)
    with pytest.raises(CheckpointError, match="is not the base of"):
        convert(checkpoint, tmp_path / "out", Wish(to="adapter"), Origin(str(other)))
    raw = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**raw, "use_llm_lora": 16}))
    with pytest.raises(CheckpointError, match="use_llm_lora 16"):
        convert(checkpoint, tmp_path / "out")


def test_an_adapter_on_an_adapter_merges_and_becomes_one(internlm2: Path, tmp_path: Path) -> None:
    model = load_model(internlm2)[0]
    first = random_pairs(model, seed=1) | {name: weight + 0.1 for name, weight in model.mlp1.named_parameters(prefix="mlp1")}
    save_adapter(tmp_path / "first", first, AdapterSettings(str(internlm2), RANK, ALPHA, modules_to_save=("mlp1",)))
    second = random_pairs(model, seed=2, tower=True)
    save_adapter(tmp_path / "second", second, AdapterSettings(str(tmp_path / "first"), RANK, 12))
    convert(tmp_path / "first", tmp_path / "stage-1")
    convert(tmp_path / "second", tmp_path / "stage-2", origin=Origin(str(tmp_path / "stage-1")))
    convert(tmp_path / "second", tmp_path / "at-once")
    one = convert(tmp_path / "second", tmp_path / "one", Wish(to="adapter"))
    assert one.proof.holds and read_adapter(tmp_path / "one").base == str(internlm2)
    convert(tmp_path / "one", tmp_path / "from-one")
    wanted = load_file(tmp_path / "stage-2" / "model.safetensors")
    require_equal(load_file(tmp_path / "at-once" / "model.safetensors"), wanted)
    require_equal(load_file(tmp_path / "from-one" / "model.safetensors"), wanted)


def test_an_adapter_that_is_over_its_bases_its_own_base_is_told(internlm2: Path, tmp_path: Path) -> None:
    state = random_pairs(load_model(internlm2)[0])
    save_adapter(tmp_path / "first", state, AdapterSettings(str(tmp_path / "second"), RANK, ALPHA))
    save_adapter(tmp_path / "second", state, AdapterSettings(str(tmp_path / "first"), RANK, ALPHA))
    with pytest.raises(CheckpointError, match="its own base"):
        convert(tmp_path / "first", tmp_path / "out")


@pytest.mark.parametrize(
    "wish", [{"to": "native", "names": "native"}, {"to": "adapter", "dtype": "float32"}, {"shard_bytes": 10}]
)
def test_wishes_that_make_no_sense_are_told(wish: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Wish(**wish)


def test_a_model_without_an_adapter_cannot_become_one(internlm2: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no adapter"):
        convert(internlm2, tmp_path / "out", Wish(to="adapter"))


def test_official_names_are_those_of_a_model_with_fused_layers(internlm2: Path, tmp_path: Path) -> None:
    """PEFT on a stand-in with InternLM2's module names: its merge of our adapter is our merge."""
    peft = pytest.importorskip("peft", reason="PEFT is the oracle of this test; it is in the train extra")
    save_adapter(tmp_path / "ours", random_pairs(load_model(internlm2)[0]), AdapterSettings(str(internlm2), RANK, ALPHA))
    convert(tmp_path / "ours", tmp_path / "official", Wish(to="adapter", names="official"))
    convert(tmp_path / "ours", tmp_path / "merged")
    weight = load_file(internlm2 / "model.safetensors")["language_model.model.layers.1.attention.wqkv.weight"]
    model = nn.Module()
    place = model
    for name in ("language_model", "model", "layers", "1", "attention"):
        place.add_module(name, nn.Module())
        place = place.get_submodule(name)
    place.wqkv = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    place.wqkv.weight.data.copy_(weight)
    config = peft.PeftConfig.from_pretrained(tmp_path / "official")
    config.target_modules = ["language_model.model.layers.1.attention.wqkv"]
    wrapped = peft.get_peft_model(model, config)
    state = load_file(tmp_path / "official" / "adapter_model.safetensors")
    peft.set_peft_model_state_dict(wrapped, {name: tensor for name, tensor in state.items() if "layers.1.attention.wqkv" in name})
    merged = wrapped.merge_and_unload().language_model.model.layers.get_submodule("1").attention.wqkv.weight
    wanted = load_file(tmp_path / "merged" / "model.safetensors")["language_model.model.layers.1.attention.wqkv.weight"]
    assert torch.allclose(merged, wanted, atol=1e-5, rtol=0)


def test_the_commands_of_the_page_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command of docs/convert.md, on tiny folders under the names that stand there."""
    page = (Path(__file__).parents[1] / "docs" / "convert.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    tessella ((?:convert|verify) +\S*\w.*?)(?:  +#.*)?$", page, flags=re.MULTILINE)
    commands = [command.split() for command in commands if not re.search(r"\b(IN|A) (OUT|B)\b", command)]
    monkeypatch.chdir(tmp_path)
    base = tiny.tiny_folder(Path("InternVL2-2B"), INTERNLM2)
    model = load_model(base)[0]
    save_adapter(Path("runs/food"), random_pairs(model), AdapterSettings(str(base.resolve()), RANK, ALPHA))
    save_adapter(Path("runs/second"), random_pairs(model, seed=2), AdapterSettings(str(Path("runs/food").resolve()), RANK, ALPHA))
    pairs = official_pairs(base, tower=False)
    Path("work_dirs").mkdir()
    training_checkpoint(base, Path("work_dirs/lora-checkpoint"), pairs, tower=False)
    torch.save({"state_dict": xtuner_state(pairs, base)}, "iter_640.pth")
    Path("internvl_v2_internlm2_2b_lora_finetune_food.py").write_text(XTUNER_CONFIG)
    assert len(commands) >= 12
    for command in commands:
        again = ["--force"] if command[0] == "convert" and Path(command[2]).exists() else []
        assert cli.main([*command, *again]) == 0, command
