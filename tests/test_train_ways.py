"""Ways to learn: rsLoRA, DoRA, each part by itself, layer decay, going on with an adapter, gradient checkpointing by module."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("peft", reason="teaching goes through PEFT, which is not installed: it is in the train extra")

from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

from tessella.checkpoint.adapters import read_adapter, read_adapter_config
from tessella.checkpoint.convert import Wish, convert
from tessella.checkpoint.lowrank import attach, fit, merge_adapter, named
from tessella.checkpoint.read import load
from tessella.errors import CheckpointError, ConfigError
from tessella.model.vision_language import VisionLanguageModel
from tessella.serving import load_adapter
from tessella.train.loop import train
from tessella.train.lora import NAME, LoraLinear, prepare
from tessella.train.optimiser import Optimiser
from tessella.train.passes import Passes
from tessella.train.recipe import Recipe
from test_train_loop import colour_samples, recipe_of
from tiny import tiny_config, tiny_folder, tiny_model

ALL_PARTS = {"tower": "lora", "projector": "lora"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("base") / "tiny", "InternLM2ForCausalLM")


def peft_merged(model: VisionLanguageModel, name: str) -> torch.Tensor:
    """A weight as PEFT itself merges it."""
    layer = model.get_submodule(name)
    assert isinstance(layer, LoraLinear)
    layer.merge(safe_merge=True)
    return layer.base_layer.weight.detach().clone()


@pytest.mark.parametrize("way", [{"rslora": True}, {"dora": True}, {"dora": True, "rslora": True}], ids=str)
def test_what_is_taught_is_merged_as_peft_merges_it_and_opens_in_peft(folder: Path, tmp_path: Path, way: dict[str, bool]) -> None:
    recipe = recipe_of(folder, tmp_path, **way, **ALL_PARTS, lora_alpha=6.0)
    result = train(recipe, samples=colour_samples())
    raw = read_adapter_config(result.adapter)
    assert (raw["use_dora"], raw["use_rslora"]) == (way.get("dora", False), way.get("rslora", False))

    theirs = load(folder, device="cpu", dtype="float32").model
    prepare(theirs, recipe)
    loaded = set_peft_model_state_dict(theirs, load_peft_weights(str(result.adapter)), adapter_name=NAME)
    assert not loaded.unexpected_keys and not [key for key in loaded.missing_keys if "lora_" in key]
    ours = load(result.adapter, device="cpu", dtype="float32").model
    changed = [name for name, module in theirs.named_modules() if isinstance(module, LoraLinear)]
    assert {name.split(".")[0] for name in changed} == {"language_model", "vision_model", "mlp1"}
    for name in changed:
        torch.testing.assert_close(ours.get_submodule(name).weight, peft_merged(theirs, name), rtol=0, atol=2e-6)


def test_dora_is_converted_to_every_layout_and_back_and_proved(folder: Path, tmp_path: Path) -> None:
    taught = train(recipe_of(folder, tmp_path / "run", dora=True, epochs=4.0), samples=colour_samples()).adapter
    whole = convert(taught, tmp_path / "official", Wish(to="official"))  # raises where the proof fails
    fused = convert(taught, tmp_path / "fused", Wish(to="adapter", names="official"))
    assert any("wqkv.lora_magnitude_vector" in key for key in load_peft_weights(str(fused.folder)))
    merged = [load(one, device="cpu", dtype="float32").model.state_dict() for one in (taught, whole.folder, fused.folder)]
    for name, tensor in merged[0].items():
        assert torch.equal(tensor, merged[1][name])
        torch.testing.assert_close(tensor, merged[2][name], rtol=0, atol=1e-6)


def test_dora_beside_the_layer_says_the_same_as_merged_and_is_not_served_beside_others(folder: Path, tmp_path: Path) -> None:
    taught = train(recipe_of(folder, tmp_path, dora=True, epochs=1.0), samples=colour_samples()).adapter
    with pytest.raises(CheckpointError, match="cannot run beside other adapters"):
        load_adapter(SimpleNamespace(), load(folder, device="cpu"), "foods", taught)  # type: ignore[arg-type]
    one, other = (load(folder, device="cpu", dtype="float32").model for _ in range(2))
    shapes = {name: tuple(weight.shape) for name, weight in one.named_parameters()}
    adapter = fit(read_adapter(taught), shapes, one.config.language)
    attach(one, adapter)
    merge_adapter(other, adapter)
    x = torch.randn(5, 64)
    name = "language_model.model.layers.1.self_attn.v_proj"
    torch.testing.assert_close(one.get_submodule(name)(x), other.get_submodule(name)(x), rtol=1e-5, atol=1e-5)


def test_a_part_of_a_fused_layer_cannot_be_dora_alone_in_an_official_adapter(folder: Path, tmp_path: Path) -> None:
    taught = train(recipe_of(folder, tmp_path, dora=True, lora_targets=("q_proj",), epochs=1.0), samples=colour_samples()).adapter
    model = load(folder, device="cpu", dtype="float32").model
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    with pytest.raises(CheckpointError, match="teach all parts of it"):
        named(fit(read_adapter(taught), shapes, model.config.language), "official", shapes, model.config.language)


def test_going_on_with_an_adapter_itself_begins_where_it_ended(folder: Path, tmp_path: Path) -> None:
    samples = colour_samples()
    first = recipe_of(folder, tmp_path / "first", epochs=4.0)
    taught = train(first, samples=samples)
    same = replace(first, model=str(taught.output), output=tmp_path / "same", further="same", epochs=1.0, learning_rate=1e-6)
    again = train(same, samples=samples)
    assert again.losses[0][1] == pytest.approx(taught.losses[-1][1], rel=0.3) and again.losses[0][1] < 0.5 * taught.losses[0][1]
    assert read_adapter_config(again.adapter)["base_model_name_or_path"] == str(folder)
    on_top = train(replace(same, output=tmp_path / "top", further="on_top"), samples=samples)
    assert read_adapter_config(on_top.adapter)["base_model_name_or_path"] == str(taught.output)
    assert on_top.losses[0][1] == pytest.approx(again.losses[0][1], rel=1e-3)
    with pytest.raises(CheckpointError, match=r"rank \[4\].*says rank 8"):
        train(replace(same, output=tmp_path / "x", lora_rank=8), samples=samples)
    with pytest.raises(CheckpointError, match="scale"):
        train(replace(same, output=tmp_path / "y", lora_alpha=8.0), samples=samples)
    with pytest.raises(ConfigError, match="no adapter"):
        train(replace(same, output=tmp_path / "z", model=str(folder)), samples=samples)


def test_lower_layers_learn_more_slowly_when_asked() -> None:
    model = tiny_model(tiny_config("LlamaForCausalLM"))
    recipe = Recipe(language="full", tower="full", layer_decay=0.5, learning_rate=1e-3, tower_learning_rate=1e-4)
    optimiser = Optimiser(prepare(model, recipe), recipe, 10)
    rates = {}
    for group, peak in zip(optimiser.adamw.param_groups, optimiser.peaks, strict=True):
        rates |= {name: peak for name, m in optimiser.masters.items() if any(m is p for p in group["params"])}
    assert rates["language_model.model.layers.1.mlp.up_proj.weight"] == 1e-3
    assert rates["language_model.model.layers.0.mlp.up_proj.weight"] == 5e-4
    assert rates["language_model.model.embed_tokens.weight"] == 2.5e-4
    assert rates["language_model.lm_head.weight"] == rates["language_model.model.norm.weight"] == 1e-3
    assert rates["mlp1.1.weight"] == 1e-3
    assert rates["vision_model.encoder.layers.0.mlp.fc1.weight"] == 5e-5
    assert rates["vision_model.embeddings.class_embedding"] == 2.5e-5


@pytest.mark.parametrize("names", [("language", "tower"), ("language.mlp", "tower.attention")], ids=str)
def test_what_is_computed_again_changes_no_gradient_and_keeps_less(names: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    from tessella.train.batch import Steps

    def gradients(recipe: Recipe) -> tuple[dict[str, torch.Tensor], int]:
        torch.manual_seed(0)
        loaded = load(folder, device="cpu", dtype="float32")
        taught = prepare(loaded.model.train(), recipe)
        steps = Steps(colour_samples(4), loaded.inputs, looks=4, samples_per_step=4, tokens_per_pass=4096, seed=0)
        passes, kept = Passes(loaded.model, recipe), {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(1)  # dropout draws the same in both
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            passes.loss(steps[0].packs[0]).backward()
        return {name: p.grad for name, p in taught.parameters.items()}, sum(kept.values())

    recipe = recipe_of(folder, tmp_path, tower="lora", lora_dropout=0.1)
    plain, before = gradients(recipe)
    again, after = gradients(replace(recipe, recompute=names))
    assert after < 0.9 * before
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_targets": ("q_porj",)}, ["q_porj", "did you mean q_proj"]),
        ({"lora_targets": ("wqkv",)}, ["wqkv", "did you mean q_proj, k_proj, v_proj"]),
        ({"tower": "lora", "tower_lora_targets": ("fc3",)}, ["tower_lora_targets", "fc3", "did you mean"]),
    ],
)
def test_a_target_that_is_no_layer_is_refused_with_near_names(changes: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(tiny_model(tiny_config("LlamaForCausalLM")), Recipe(**changes))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recompute": ("tower",)}, "the tower is frozen"),
        ({"recompute": ("language", "language.mlp")}, "lies in it"),
        ({"recompute": ("head",)}, "recompute"),
        ({"language": "full", "projector": "lora"}, "whole model"),
        ({"layer_decay": 0.0}, "layer_decay"),
        ({"further": "again"}, "further"),
    ],
)
def test_ways_that_contradict_each_other_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Recipe(**changes)
