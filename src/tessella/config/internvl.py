"""The config.json of InternVL, official (InternVLChatModel) or native (InternVLForConditionalGeneration) -> ModelConfig.

Source of the fields: OpenGVLab/InternVL at 2410d1d, configuration_internvl_chat.py and configuration_intern_vit.py;
configuration_internvl.py of huggingface/transformers at 5.23.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from tessella.config.fields import need, section
from tessella.config.language import language_config
from tessella.config.parts import (
    CONTEXT_TOKENS,
    MODEL_TYPES,
    NATIVE_MODEL_TYPES,
    ConnectorConfig,
    ModelConfig,
    QFormerConfig,
    VisionConfig,
)
from tessella.errors import ConfigError


def official(raw: Mapping[str, Any]) -> ModelConfig:
    """The dict of an official config.json -> ModelConfig. Raises ConfigError."""
    if raw.get("pad2square"):
        raise ConfigError("config.json: pad2square is true; only the tile rule without padding is known")
    vision = vision_config(section(raw, "vision_config"))
    dynamic = bool(raw.get("dynamic_image_size", True))
    llm = section(raw, "llm_config")
    architectures = need(llm, "architectures", "llm_config")
    language = language_config(llm, str(architectures[0]) if architectures else "", "llm_config")
    return ModelConfig(
        vision=vision,
        language=language,
        template=str(need(raw, "template", "config.json")),
        tile_size_px=int(raw.get("force_image_size") or vision.image_size_px),
        downsample_ratio=float(raw.get("downsample_ratio", 0.5)),
        pixel_shuffle_version=str(raw.get("ps_version", "v1")),
        select_layer=int(raw.get("select_layer", -1)),
        min_tiles=int(raw.get("min_dynamic_patch", 1)) if dynamic else 1,
        max_tiles=int(raw.get("max_dynamic_patch", 12)) if dynamic else 1,
        use_thumbnail=bool(raw.get("use_thumbnail", True)),
        context_tokens=min(CONTEXT_TOKENS, language.max_positions),
        connector=named_connector((raw.get("tessella") or {}).get("connector")),
    )


def named_connector(raw: Mapping[str, Any] | None) -> ConnectorConfig:
    """Our own section's word for a connector that is not InternVL's; None is InternVL's. Raises ConfigError."""
    where, qformer = "tessella.connector", None
    if raw is None:
        return ConnectorConfig()
    if raw.get("qformer") is not None:
        qformer = QFormerConfig(**_known(QFormerConfig, raw["qformer"], f"{where}.qformer"))
    return ConnectorConfig(**{**_known(ConnectorConfig, raw, where), "qformer": qformer})


def _known(kind: type[ConnectorConfig] | type[QFormerConfig], raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a section. Raises ConfigError for one that is unknown, missing, or of another type."""
    known = {field.name: field for field in fields(kind)}
    unknown = [name for name in raw if name not in known]
    if unknown:
        raise ConfigError(f"{where} has {', '.join(unknown)}; known are {', '.join(known)}")
    for name, field in known.items():
        if field.default is MISSING:
            need(raw, name, where)
        wanted = {int: int, bool: bool, str: str, float: float}.get(field.type)  # type: ignore[arg-type]
        if name in raw and wanted is not None and type(raw[name]) is not wanted:
            raise ConfigError(f"{where}.{name} is {raw[name]!r}, must be of type {wanted.__name__}")
    return dict(raw)


def native(raw: Mapping[str, Any]) -> ModelConfig:
    """The dict of a native config.json -> ModelConfig. Raises ConfigError.

    What this layout cannot say stands in our section "tessella". A folder of others lacks it: its prompt is InternVL 2.5's,
    which 3 and 3.5 share, and its tile rule the family's.
    """
    fixed = {"vision_feature_select_strategy": "default", "projector_hidden_act": "gelu"}
    for key, value in fixed.items():
        if raw.get(key, value) != value:
            raise ConfigError(f'config.json: {key} is "{raw[key]}", must be "{value}"')
    own: Mapping[str, Any] = raw.get("tessella") or {}
    vision = vision_config(_as_official_vision(section(raw, "vision_config")))
    text = section(raw, "text_config")
    kind = str(need(text, "model_type", "text_config"))
    usual = next((name for name, known in MODEL_TYPES.items() if known == kind), f"{kind} (text_config.model_type)")
    architecture = str(own.get("architecture") or usual)
    if NATIVE_MODEL_TYPES.get(architecture, kind) != kind:
        raise ConfigError(f'config.json: tessella.architecture is "{architecture}", but text_config.model_type is "{kind}"')
    filled = {"tie_word_embeddings": raw.get("tie_word_embeddings", False), **NATIVE_TEXT_DEFAULTS.get(kind, {}), **text}
    if "rope_theta" not in (text.get("rope_parameters") or text):
        filled["rope_theta"] = NATIVE_ROPE_THETA
    language = language_config(filled, architecture, "text_config")
    layer = raw.get("vision_feature_layer", -1)
    if not isinstance(layer, int):
        raise ConfigError(f"config.json: vision_feature_layer is {layer}, must be one number")
    side = math.isqrt(int(raw.get("image_seq_length", 256)))  # slots lie in a square
    return ModelConfig(
        vision=vision,
        language=language,
        template=str(own.get("template", "internvl2_5")),
        tile_size_px=side * 2 * vision.patch_size_px,
        downsample_ratio=float(raw.get("downsample_ratio", 0.5)),
        select_layer=layer,
        min_tiles=int(own.get("min_dynamic_patch", 1)),
        max_tiles=int(own.get("max_dynamic_patch", 12)),
        use_thumbnail=bool(own.get("use_thumbnail", True)),
        context_tokens=min(CONTEXT_TOKENS, language.max_positions),
    )


# Fields that transformers leaves out of a file where they equal its own defaults.
NATIVE_ROPE_THETA = 1e4
_QWEN = {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "num_key_value_heads": 32}
NATIVE_TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "phi3": {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
}
NATIVE_VISION_DEFAULTS: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
NATIVE_VISION_DEFAULTS |= {"num_attention_heads": 16, "image_size": [448, 448], "patch_size": [14, 14]}
NATIVE_VISION_DEFAULTS |= {"attention_bias": False, "use_qk_norm": False, "layer_scale_init_value": 0.1}


def _as_official_vision(native: Mapping[str, Any]) -> dict[str, Any]:
    """The native vision_config in official words. Raises ConfigError for what only the native layout knows."""
    raw = {**NATIVE_VISION_DEFAULTS, **native}
    for key, value in {"use_mask_token": False, "use_absolute_position_embeddings": True, "use_mean_pooling": True}.items():
        if raw.get(key, value) != value:
            raise ConfigError(f"vision_config.{key} is {raw[key]}, must be {value}")
    for key in ("image_size", "patch_size"):
        sides = raw[key] if isinstance(raw[key], list) else [raw[key]]
        if len(set(sides)) != 1:
            raise ConfigError(f"vision_config.{key} is {sides}, must be square")
        raw[key] = sides[0]
    words = {"qkv_bias": "attention_bias", "qk_normalization": "use_qk_norm", "initializer_factor": "layer_scale_init_value"}
    return {**raw, **{official: raw[word] for official, word in words.items()}}


def vision_config(raw: Mapping[str, Any]) -> VisionConfig:
    """The vision_config section -> VisionConfig. Raises ConfigError."""
    where = "vision_config"
    activation = raw.get("hidden_act", "gelu")
    if activation != "gelu":
        raise ConfigError(f'{where}.hidden_act is "{activation}", must be "gelu"')
    if raw.get("num_channels", 3) != 3:
        raise ConfigError(f"{where}.num_channels is {raw['num_channels']}, must be 3")
    return VisionConfig(
        hidden_size=int(need(raw, "hidden_size", where)),
        intermediate_size=int(need(raw, "intermediate_size", where)),
        num_layers=int(need(raw, "num_hidden_layers", where)),
        num_heads=int(need(raw, "num_attention_heads", where)),
        image_size_px=int(need(raw, "image_size", where)),
        patch_size_px=int(need(raw, "patch_size", where)),
        norm=str(raw.get("norm_type", "layer_norm")),
        norm_eps=float(raw.get("layer_norm_eps", 1e-6)),
        qkv_bias=bool(need(raw, "qkv_bias", where)),
        qk_norm=bool(raw.get("qk_normalization", False)),
        layer_scale_init=float(raw.get("initializer_factor", 1.0)),
    )
