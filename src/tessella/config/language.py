"""The section of the language model in a config.json, of either layout or of a relative -> LanguageConfig.

Source of the rotary fields: modeling_rope_utils.py of huggingface/transformers at 5.23.
"""

import math
from collections.abc import Mapping
from typing import Any

from tessella.config.fields import need
from tessella.config.parts import CONTEXT_TOKENS, LanguageConfig, Llama3Rope, LongRope
from tessella.errors import ConfigError


def language_config(raw: Mapping[str, Any], architecture: str, where: str) -> LanguageConfig:
    """The section of the language model -> LanguageConfig. Raises ConfigError."""
    _refuse_unknown_arithmetic(raw, where)
    heads = int(need(raw, "num_attention_heads", where))
    hidden = int(need(raw, "hidden_size", where))
    # InternLM2 calls it bias, and its configuration class defaults to True; the others default to False.
    official_internlm2 = architecture == "InternLM2ForCausalLM" and where == "llm_config"
    bias = bool(raw.get("bias", True) if official_internlm2 else raw.get("attention_bias", False))
    qwen2 = architecture == "Qwen2ForCausalLM"  # has biases on q, k, v and none on the output, by definition
    return LanguageConfig(
        architecture=architecture,
        vocab_size=int(need(raw, "vocab_size", where)),
        hidden_size=hidden,
        intermediate_size=int(need(raw, "intermediate_size", where)),
        num_layers=int(need(raw, "num_hidden_layers", where)),
        num_heads=heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or hidden // heads),
        norm_eps=float(need(raw, "rms_norm_eps", where)),
        max_positions=int(need(raw, "max_position_embeddings", where)),
        qkv_bias=bias or qwen2,
        qk_norm=architecture == "Qwen3ForCausalLM",
        output_bias=bias and not qwen2,
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        **_rope(raw, where),
    )


def _refuse_unknown_arithmetic(raw: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError for fields that would make the model compute what we do not."""
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise ConfigError(f'{where}.hidden_act is "{activation}", must be "silu"')
    if raw.get("model_type") == "internlm3" and (raw.get("bias") or raw.get("qkv_bias")):
        raise ConfigError(f"{where} has biases (bias, qkv_bias), and an InternLM3 with them is not known; must be false")
    if raw.get("mlp_bias"):
        raise ConfigError(f"{where}.mlp_bias is true, must be false")
    # Phi-3 and Mistral have a window but no switch for it; Qwen's switch is off unless said. Wider than a prompt, a window
    # does nothing.
    always_on = raw.get("model_type") in ("phi3", "mistral")
    window, switched_on = raw.get("sliding_window"), raw.get("use_sliding_window", always_on)
    if switched_on and window is not None and window < CONTEXT_TOKENS:
        raise ConfigError(f"{where}.sliding_window is {window}; windows under {CONTEXT_TOKENS:,} tokens are not known")
    turned = (raw.get("rope_parameters") or {}).get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if turned not in (None, 1.0):
        raise ConfigError(f"{where}.partial_rotary_factor is {turned}, must be 1")


def _rope(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The rope fields of LanguageConfig, from transformers' 4.x keys (rope_theta, rope_scaling) or 5.x's rope_parameters."""
    new: Mapping[str, Any] = raw.get("rope_parameters") or {}
    scaling: Mapping[str, Any] = raw.get("rope_scaling") or new
    theta = new.get("rope_theta") or raw.get("rope_theta")
    if theta is None:
        raise ConfigError(f"{where} names no rope_theta; a wrong base gives wrong answers silently, so it must be there")
    if float(theta) != float(raw.get("rope_theta") or theta):
        raise ConfigError(f"{where}: rope_theta is {raw['rope_theta']}, but {theta} in rope_parameters; they must agree")
    found: dict[str, Any] = {"rope_theta": float(theta)}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    original = raw.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
    if kind == "dynamic":
        return {**found, "rope_dynamic_factor": float(scaling["factor"])}
    if kind in ("su", "longrope"):
        return {**found, "rope_long": _long_rope(scaling, raw, int(original or raw["max_position_embeddings"]))}
    if kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor")
        factor, low, high = (float(need(scaling, key, f"{where}.rope_scaling")) for key in keys)
        return {**found, "rope_llama3": Llama3Rope(factor, low, high, int(original or raw["max_position_embeddings"]))}
    if kind != "default":
        raise ConfigError(f'{where}.rope_scaling is of type "{kind}", we can run "dynamic", "longrope" ("su"), "llama3" or none')
    return found


def _long_rope(scaling: Mapping[str, Any], raw: Mapping[str, Any], original: int) -> LongRope:
    short, long = (
        tuple(float(x) for x in need(scaling, key, "rope_scaling of Phi-3")) for key in ("short_factor", "long_factor")
    )
    factor = float(scaling.get("factor") or int(raw["max_position_embeddings"]) / original)
    return LongRope(short, long, original, float(scaling.get("attention_factor") or long_attention_factor(factor, original)))


def long_attention_factor(factor: float, original: int) -> float:
    """What LongRope's attention_factor is where a config does not say it; factor: by how much the length was stretched."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
