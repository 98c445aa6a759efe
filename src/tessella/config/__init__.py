"""What a model is made of, and how that is read from a checkpoint's config.json. These are the words for other rooms."""

from tessella.config.fields import read_config_json, read_json
from tessella.config.internvl import NATIVE_ROPE_THETA, NATIVE_TEXT_DEFAULTS, NATIVE_VISION_DEFAULTS
from tessella.config.language import long_attention_factor
from tessella.config.parts import (
    MODEL_TYPES,
    NATIVE_MODEL_TYPES,
    ConnectorConfig,
    LanguageConfig,
    Llama3Rope,
    LongRope,
    ModelConfig,
    QFormerConfig,
    VisionConfig,
)
from tessella.config.read import NATIVE, OFFICIAL, is_native, layout_name, load_config, model_config

__all__ = [
    "MODEL_TYPES",
    "NATIVE",
    "NATIVE_MODEL_TYPES",
    "NATIVE_ROPE_THETA",
    "NATIVE_TEXT_DEFAULTS",
    "NATIVE_VISION_DEFAULTS",
    "OFFICIAL",
    "ConnectorConfig",
    "LanguageConfig",
    "Llama3Rope",
    "LongRope",
    "ModelConfig",
    "QFormerConfig",
    "VisionConfig",
    "is_native",
    "layout_name",
    "load_config",
    "long_attention_factor",
    "model_config",
    "read_config_json",
    "read_json",
]
