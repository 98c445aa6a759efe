"""Weight names and the rows of fused tensors: what is written is what was read, and the rows lie as published."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from tessella.checkpoint.layout import official_config
from tessella.checkpoint.names import (
    Layout,
    cut_rows,
    fuse_rows,
    group_of,
    group_of_stored,
    groups_of,
    official_name,
    our_names,
    stored_shapes,
)
from tessella.config import LanguageConfig, model_config
from tessella.errors import CheckpointError
from tessella.model.vision_language import VisionLanguageModel

LAYOUTS: tuple[Layout, ...] = ("official", "native")
LAYER = "language_model.model.layers.1."


def language(architecture: str, groups: int, shared: int, d: int) -> LanguageConfig:
    heads = groups * shared
    return LanguageConfig(architecture, 10, heads * d, 8, 1, heads, groups, d)


@given(groups=st.integers(1, 5), shared=st.integers(1, 4), d=st.sampled_from([2, 4, 6]), width=st.integers(1, 3))
def test_internlm2s_rows_are_query_heads_key_value_for_each_group(groups: int, shared: int, d: int, width: int) -> None:
    config = language("InternLM2ForCausalLM", groups, shared, d)
    fused = torch.arange((shared + 2) * groups * d * width).reshape(-1, width)
    q, k, v = cut_rows(fused, "grouped", config)
    row = 0
    for group in range(groups):  # the published order, said as a loop
        for j in range(shared):
            head = group * shared + j
            assert torch.equal(q[head * d : (head + 1) * d], fused[row : row + d])
            row += d
        for part in (k, v):
            assert torch.equal(part[group * d : (group + 1) * d], fused[row : row + d])
            row += d
    assert row == len(fused)
    assert torch.equal(fuse_rows((q, k, v), "grouped", config), fused)


def test_phi3s_rows_lie_one_part_after_another() -> None:
    config = language("Phi3ForCausalLM", 2, 3, 4)
    fused = torch.arange((6 + 2 + 2) * 4)
    q, k, v = cut_rows(fused, "qkv", config)
    assert (q.tolist(), k.tolist(), v.tolist()) == (list(range(24)), list(range(24, 32)), list(range(32, 40)))
    assert torch.equal(fuse_rows((q, k, v), "qkv", config), fused)
    group = group_of(LAYER + "mlp.up_proj.weight", "official", config)
    assert group.stored == (LAYER + "mlp.gate_up_proj.weight",)
    assert [part.tolist() for part in group.to_ours([torch.arange(6)], config).values()] == [[0, 1, 2], [3, 4, 5]]  # gate first


@pytest.mark.parametrize(("rows", "parts"), [("grouped", 3), ("qkv", 3), ("equal", 2), ("equal", 3)])
def test_the_change_of_a_low_rank_pair_is_cut_as_its_weight_is(rows: str, parts: int) -> None:
    config = language("InternLM2ForCausalLM", 2, 2, 6)
    a, b = torch.randn(3, 5), torch.randn(48, 3)
    whole, bias = cut_rows(b @ a, rows, config, parts), cut_rows(b[:, 0], rows, config, parts)  # type: ignore[arg-type]
    for change, part, one in zip(whole, cut_rows(b, rows, config, parts), bias, strict=True):  # type: ignore[arg-type]
        assert torch.allclose(change, part @ a) and torch.equal(one, part[:, 0])


def test_a_fused_tensor_with_the_wrong_number_of_rows_is_refused() -> None:
    config = language("InternLM2ForCausalLM", 2, 2, 4)
    with pytest.raises(CheckpointError, match=r"wqkv\.weight has 31 rows, must have 32"):
        group_of(LAYER + "self_attn.q_proj.weight", "official", config).to_ours([torch.zeros(31, 4)], config)
    config = language("Phi3ForCausalLM", 2, 2, 4)
    with pytest.raises(CheckpointError, match=r"gate_up_proj\.weight has 15 rows, which do not fall into 2 equal parts"):
        group_of(LAYER + "mlp.up_proj.weight", "official", config).to_ours([torch.zeros(15, 4)], config)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_every_parameter_goes_out_and_comes_back(name: str, layout: Layout) -> None:
    config = tiny.family(name)
    ours = {parameter: weight.detach() for parameter, weight in tiny.tiny_model(config).named_parameters()}
    shapes = {parameter: tuple(weight.shape) for parameter, weight in ours.items()}
    back: dict[str, torch.Tensor] = {}
    stored: list[str] = []
    for group in groups_of(ours, layout, config.language):
        tensors = group.to_stored([ours[parameter] for parameter in group.ours], config.language)
        assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == stored_shapes(group, shapes, config.language)
        assert all(group_of_stored(key, layout, config.language) == group for key in tensors)
        stored += tensors
        back |= group.to_ours(list(tensors.values()), config.language)
    assert len(set(stored)) == len(stored)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[parameter], ours[parameter]) for parameter in ours)


def test_modules_and_their_parameters_have_one_name_in_common() -> None:
    config = tiny.tiny_config("InternLM2ForCausalLM").language
    assert official_name(LAYER + "self_attn.k_proj", config) == LAYER + "attention.wqkv"
    assert our_names(LAYER + "attention.wqkv.lora_B", config) == tuple(f"{LAYER}self_attn.{x}_proj.lora_B" for x in "qkv")
    tower = group_of("vision_model.encoder.layers.11.attn.qkv", "native", config)
    assert tower.stored == tuple(f"vision_tower.encoder.layer.11.attention.{x}_proj" for x in "qkv")
    assert group_of_stored("model.vision_tower.encoder.layer.11.attention.v_proj", "native", config) == tower


def test_internlm2_names_are_the_official_ones_and_no_llama_word_is_left() -> None:
    config = tiny.tiny_config("InternLM2ForCausalLM")
    names = {official_name(name, config.language) for name, _ in VisionLanguageModel(config).named_parameters()}
    assert {
        "language_model.model.tok_embeddings.weight",
        "language_model.output.weight",
        "language_model.model.norm.weight",
        *(LAYER + part for part in ("attention.wqkv.weight", "attention.wo.weight", "attention_norm.weight", "ffn_norm.weight")),
        *(f"{LAYER}feed_forward.w{i}.weight" for i in (1, 2, 3)),
    } <= names
    words = ("q_proj", "k_proj", "v_proj", "embed_tokens", "lm_head", "self_attn", "mlp.gate", "input_layernorm")
    assert not [name for name in names if any(word in name for word in words)]
    llama = tiny.tiny_config("LlamaForCausalLM").language
    assert official_name(LAYER + "self_attn.q_proj.weight", llama) == LAYER + "self_attn.q_proj.weight"


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_config_json_is_read_back_as_the_config_it_was_made_from(name: str) -> None:
    config = tiny.family(name)
    assert model_config(official_config(config, "float32")) == config
