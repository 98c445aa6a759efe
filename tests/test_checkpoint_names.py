"""Weight names and InternLM2's fused rows: what is written is what was read, and the rows are grouped as published."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from tessella.checkpoint.layout import official_config
from tessella.checkpoint.names import join, join_rows, official_name, official_shape, our_names, split, split_rows
from tessella.config import LanguageConfig, model_config
from tessella.errors import CheckpointError
from tessella.model.vision_language import VisionLanguageModel


def internlm2(groups: int, shared: int, d: int) -> LanguageConfig:
    heads = groups * shared
    return LanguageConfig("InternLM2ForCausalLM", 10, heads * d, 8, 1, heads, groups, d)


@given(groups=st.integers(1, 5), shared=st.integers(1, 4), d=st.sampled_from([2, 4, 6]), width=st.integers(1, 3))
def test_rows_lie_as_published_query_heads_key_value_for_each_group(groups: int, shared: int, d: int, width: int) -> None:
    language = internlm2(groups, shared, d)
    fused = torch.arange((shared + 2) * groups * d * width).reshape(-1, width)
    q, k, v = split_rows(fused, language)
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
    assert torch.equal(join_rows(q, k, v, language), fused)


def test_biases_and_lora_halves_split_by_the_same_rows() -> None:
    language = internlm2(2, 2, 4)
    bias = torch.arange(32.0)
    assert [len(part) for part in split_rows(bias, language)] == [16, 8, 8]
    assert torch.equal(join_rows(*split_rows(bias, language), language), bias)


def test_a_fused_tensor_with_the_wrong_number_of_rows_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"wqkv has 31 rows, must have 32"):
        split_rows(torch.zeros(31, 4), internlm2(2, 2, 4))


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_goes_out_and_comes_back(architecture: str, tied: bool) -> None:
    config = tiny.tiny_config(architecture, tie_embeddings=tied)
    language = config.language
    ours = {name: weight.detach() for name, weight in tiny.tiny_model(config).named_parameters()}
    shapes = {name: tuple(weight.shape) for name, weight in ours.items()}
    back: dict[str, torch.Tensor] = {}
    for official in dict.fromkeys(official_name(name, language) for name in ours):
        tensor = join(official, ours, language)
        assert tuple(tensor.shape) == official_shape(official, shapes, language)
        parts = split(official, tensor, language)
        assert tuple(parts) == our_names(official, language)
        assert not parts.keys() & back.keys()
        back |= parts
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)


def test_internlm2_names_are_the_official_ones_and_no_llama_word_is_left() -> None:
    config = tiny.tiny_config("InternLM2ForCausalLM")
    names = {official_name(name, config.language) for name, _ in VisionLanguageModel(config).named_parameters()}
    layer = "language_model.model.layers.1."
    assert {
        "language_model.model.tok_embeddings.weight",
        "language_model.output.weight",
        "language_model.model.norm.weight",
        *(layer + part for part in ("attention.wqkv.weight", "attention.wo.weight", "attention_norm.weight", "ffn_norm.weight")),
        *(f"{layer}feed_forward.w{i}.weight" for i in (1, 2, 3)),
    } <= names
    words = ("q_proj", "k_proj", "v_proj", "embed_tokens", "lm_head", "self_attn", "mlp.gate", "input_layernorm")
    assert not [name for name in names if any(word in name for word in words)]
    llama = tiny.tiny_config("LlamaForCausalLM").language
    assert official_name(layer + "self_attn.q_proj.weight", llama) == layer + "self_attn.q_proj.weight"


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_config_json_is_read_back_as_the_config_it_was_made_from(architecture: str) -> None:
    config = tiny.tiny_config(architecture)
    assert model_config(official_config(config, "float32")) == config
