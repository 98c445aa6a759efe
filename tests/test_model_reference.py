"""Our model against transformers' native InternVL, with tiny random weights in float32."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from tessella.config import LanguageConfig, ModelConfig, VisionConfig
from tessella.generate import all_logits, generate, generate_batch
from tessella.image import normalise
from tessella.inputs import ModelInput
from tessella.model.attend import Dense
from tessella.model.connectors import pixel_shuffle
from tessella.model.layers import rope_base
from tessella.model.vision_language import VisionLanguageModel
from tessella.sampling import SamplingParams

transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")

SIDE, PATCH, VOCAB, SLOT, SLOTS = 56, 14, 120, 7, 4
ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "InternLM2ForCausalLM")


def our_config(architecture: str, **vision: object) -> ModelConfig:
    tower = VisionConfig(32, 64, num_layers=3, num_heads=4, image_size_px=SIDE, patch_size_px=PATCH, **vision)  # type: ignore[arg-type]
    language = LanguageConfig(
        architecture, VOCAB, 48, 96, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=8, rope_theta=1e6,
        rope_dynamic_factor=2.0, max_positions=512, qkv_bias=architecture == "Qwen2ForCausalLM",
    )  # fmt: skip
    return ModelConfig(tower, language, "chatml", tile_size_px=SIDE)


def native_model(config: ModelConfig):
    """transformers' own model of the same shape, with random weights of a size that makes answers vary."""
    v, t = config.vision, config.language
    kind = transformers.Qwen2Config if t.architecture == "Qwen2ForCausalLM" else transformers.LlamaConfig
    text = kind(
        vocab_size=t.vocab_size, hidden_size=t.hidden_size, intermediate_size=t.intermediate_size, num_hidden_layers=t.num_layers,
        num_attention_heads=t.num_heads, num_key_value_heads=t.num_kv_heads, head_dim=t.head_dim, rms_norm_eps=t.norm_eps,
        max_position_embeddings=t.max_positions, tie_word_embeddings=False,
        rope_parameters={"rope_type": "dynamic", "factor": t.rope_dynamic_factor, "rope_theta": t.rope_theta},
    )  # fmt: skip
    vision = transformers.InternVLVisionConfig(
        hidden_size=v.hidden_size, num_hidden_layers=v.num_layers, num_attention_heads=v.num_heads,
        intermediate_size=v.intermediate_size, image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH], use_qk_norm=v.qk_norm,
        attention_bias=v.qkv_bias, norm_type=v.norm,
        layer_norm_eps=v.norm_eps, use_mean_pooling=True,
    )  # fmt: skip
    whole = transformers.InternVLConfig(vision_config=vision, text_config=text, image_token_id=SLOT, image_seq_length=SLOTS)
    model = transformers.InternVLForConditionalGeneration(whole).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.2)
    return model


RENAMES = {
    "model.vision_tower.": "vision_model.",
    "cls_token": "class_embedding",
    "position_embeddings": "position_embedding",
    "patch_embeddings.projection": "patch_embedding",
    "encoder.layer.": "encoder.layers.",
    "attention.projection_layer": "attn.proj",
    "attention.q_norm": "attn.q_norm",
    "attention.k_norm": "attn.k_norm",
    "lambda_": "ls",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "model.multi_modal_projector.layer_norm": "mlp1.0",
    "model.multi_modal_projector.linear_1": "mlp1.1",
    "model.multi_modal_projector.linear_2": "mlp1.3",
    "model.language_model.": "language_model.model.",
    "lm_head": "language_model.lm_head",
}


def our_model(native, config: ModelConfig) -> VisionLanguageModel:
    """Ours with the weights of transformers' model, renamed here by hand, not by the code under test."""
    state = {}
    for name, value in native.state_dict().items():
        for theirs, ours in RENAMES.items():
            name = name.replace(theirs, ours)
        state[name] = value
    for name in [n for n in state if "vision_model" in n and ".attention.q_proj." in n]:
        parts = [state.pop(name.replace("q_proj", p)) for p in ("q_proj", "k_proj", "v_proj")]
        state[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    model = VisionLanguageModel(config).eval()
    model.load_state_dict(state)
    return model


def prompt(*turns: int | str, seed: int = 0) -> ModelInput:
    """Each number n is a picture of n tiles, each word a stretch of text."""
    chance = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    for turn in turns:
        if isinstance(turn, int):
            ids += [5, *[SLOT] * (SLOTS * turn), 6]
        else:
            ids += torch.randint(10, VOCAB, (len(turn),), generator=chance).tolist()
    tiles = sum(t for t in turns if isinstance(t, int))
    pixels = torch.randint(0, 256, (tiles, 3, SIDE, SIDE), dtype=torch.uint8, generator=chance)
    row = torch.tensor(ids)
    digests = tuple(hashlib.sha256(tile.numpy().tobytes()).hexdigest() for tile in pixels)
    return ModelInput(row, torch.zeros_like(row, dtype=torch.bool), row == SLOT, pixels, (), digests)


PROMPTS = {
    "text only": prompt("what is the capital"),
    "one tile": prompt("look", 1, "what is it"),
    "13 tiles": prompt(13, "what is it"),
    "two images": prompt(2, "and", 3, "which is larger"),
    "two turns": prompt("hello", 1, "what is it", "a dog", 2, "and this"),
}


def their_logits(native, one: ModelInput) -> torch.Tensor:
    pixels = normalise(one.tiles, torch.float32) if len(one.tiles) else None
    with torch.inference_mode():
        return native(input_ids=one.ids[None], pixel_values=pixels).logits[0]


@pytest.fixture(scope="module", params=["LlamaForCausalLM", "Qwen2ForCausalLM"])
def pair(request):
    config = our_config(request.param)
    native = native_model(config)
    return native, our_model(native, config)


@pytest.mark.parametrize("name", PROMPTS)
def test_logits_equal_transformers(pair, name):
    native, ours = pair
    theirs, mine = their_logits(native, PROMPTS[name]), all_logits(ours, PROMPTS[name])
    assert theirs.std() > 0.1
    assert (theirs - mine).abs().max() < 1e-4


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_ids_equal_transformers_over_64_tokens(pair, name):
    native, ours = pair
    one = PROMPTS[name]
    pixels = {"pixel_values": normalise(one.tiles, torch.float32)} if len(one.tiles) else {}
    whole = native.generate(
        input_ids=one.ids[None], attention_mask=torch.ones_like(one.ids)[None], max_new_tokens=64, min_new_tokens=64,
        do_sample=False, pad_token_id=0, **pixels,
    )  # fmt: skip
    theirs = whole[0, len(one) :].tolist()
    mine = list(generate(ours, one, SamplingParams(max_tokens=64), stop_ids=()))
    assert mine == theirs and len(set(mine)) > 3


@pytest.mark.parametrize(
    "vision", [{"norm": "rms_norm", "qkv_bias": False, "qk_norm": True}, {"norm": "rms_norm"}, {"qk_norm": True}], ids=str
)
def test_tower_variants_equal_transformers(vision):
    config = our_config("LlamaForCausalLM", **vision)
    native = native_model(config)
    one = PROMPTS["two images"]
    assert (their_logits(native, one) - all_logits(our_model(native, config), one)).abs().max() < 1e-4


def test_positions_for_another_tile_size_equal_transformers():
    config = our_config("LlamaForCausalLM")
    native = native_model(config)
    ours = our_model(native, config)
    tiles = torch.rand(2, 3, 84, 84)
    with torch.inference_mode():
        theirs = native.model.vision_tower(pixel_values=tiles).last_hidden_state[:, 1:].unflatten(1, (6, 6))
        assert (ours.vision_model(tiles) - theirs).abs().max() < 1e-4


def test_rope_is_stretched_beyond_the_trained_length_as_in_transformers(pair):
    native, ours = pair
    one = prompt("x" * 700, 1)
    assert len(one) > ours.config.language.max_positions
    assert rope_base(ours.config.language, len(one)) > rope_base(ours.config.language, 512)
    assert (their_logits(native, one) - all_logits(ours, one)).abs().max() < 1e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", [*PROMPTS, "beyond"])
def test_cached_run_equals_uncached_run_token_by_token(architecture, name):
    torch.manual_seed(1)
    ours = VisionLanguageModel(our_config(architecture)).eval()
    one = PROMPTS[name] if name != "beyond" else prompt("x" * 505, 1)
    params = SamplingParams(max_tokens=16)
    cached = list(generate(ours, one, params, stop_ids=()))
    ids, total = one.ids, len(one) + params.max_tokens
    for token in cached:
        attend = Dense(1, 3)
        attend.begin([len(ids)])
        visual = ours.visual_tokens(one.tiles) if len(one.tiles) else None
        slots = torch.cat((one.slots, torch.zeros(len(ids) - len(one), dtype=torch.bool)))
        hidden = ours(ours.embed(ids, slots, visual), torch.arange(len(ids)), attend, total)
        assert int(ours.logits(hidden[-1]).argmax()) == token
        ids = torch.cat((ids, torch.tensor([token])))


@pytest.fixture(scope="module")
def alone():
    """(model, params, the answer to each prompt alone): made once, for the examples below are many."""
    torch.manual_seed(2)
    ours = VisionLanguageModel(our_config("LlamaForCausalLM")).eval()
    params = SamplingParams(max_tokens=8)
    return ours, params, {name: list(generate(ours, PROMPTS[name], params, stop_ids=(11,))) for name in PROMPTS}


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(list(PROMPTS)), together=st.integers(1, 5))
def test_a_row_is_answered_alike_in_any_company(alone, order, together):
    ours, params, answers = alone
    got = generate_batch(ours, [PROMPTS[name] for name in order], params, (11,), rows_at_once=together)
    assert got == [answers[name] for name in order]


def test_a_row_beyond_phi3s_original_length_changes_no_neighbour():
    config = tiny.family("Phi-3")
    ours, rows = tiny.tiny_model(config), [prompt("x" * 50), prompt("y" * config.language.unstretched_tokens)]
    params = SamplingParams(max_tokens=8)
    assert generate_batch(ours, rows, params, ()) == [list(generate(ours, row, params, stop_ids=())) for row in rows]


def test_pixel_shuffle_puts_each_square_row_by_row():
    x = torch.arange(4 * 4 * 2).reshape(1, 4, 4, 2)
    token = pixel_shuffle(x)[0, 1]  # the second folded patch of the first row
    assert token.tolist() == torch.cat([x[0, 0, 2], x[0, 0, 3], x[0, 1, 2], x[0, 1, 3]]).tolist()
    old = pixel_shuffle(x, version="v1").reshape(1, 2, 2, 8)
    assert torch.equal(old.transpose(1, 2), pixel_shuffle(x).reshape(1, 2, 2, 8).unflatten(-1, (2, 2, 2)).flatten(-3))
    with pytest.raises(ValueError, match="3 x 4"):
        pixel_shuffle(torch.zeros(1, 3, 4, 2))
