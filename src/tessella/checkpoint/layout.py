"""The official folder's JSON files, made from a ModelConfig.

In: ModelConfig, the ids of the tokens that end a turn.  Out: the dicts of config.json, generation_config.json and
preprocessor_config.json, and the way back is config.model_config.
Source: configuration_internvl_chat.py and configuration_intern_vit.py of OpenGVLab/InternVL at 2410d1d.
"""

from collections.abc import Sequence
from typing import Any

from tessella.config import LanguageConfig, ModelConfig, VisionConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MODEL_TYPES = {"InternLM2ForCausalLM": "internlm2", "LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}


def official_config(config: ModelConfig, dtype_name: str) -> dict[str, Any]:
    """config.json. dtype_name: "bfloat16", "float32" or "float16", what the weights are stored in."""
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": "modeling_internvl_chat.InternVLChatModel",
            "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
        },
        "model_type": "internvl_chat",
        "template": config.template,
        "downsample_ratio": config.downsample_ratio,
        "dynamic_image_size": config.max_tiles > 1,
        "force_image_size": config.tile_size_px,
        "min_dynamic_patch": config.min_tiles,
        "max_dynamic_patch": config.max_tiles,
        "use_thumbnail": config.use_thumbnail,
        "pad2square": False,
        "ps_version": config.pixel_shuffle_version,
        "select_layer": config.select_layer,
        "torch_dtype": dtype_name,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "tie_word_embeddings": config.language.tie_embeddings,
        "llm_config": _language(config.language, dtype_name),
        "vision_config": _vision(config.vision, dtype_name),
    }


def _language(language: LanguageConfig, dtype_name: str) -> dict[str, Any]:
    dynamic = language.rope_dynamic_factor
    biased = "bias" if language.architecture == "InternLM2ForCausalLM" else "attention_bias"
    section: dict[str, Any] = {
        "architectures": [language.architecture],
        "model_type": MODEL_TYPES[language.architecture],
        "attn_implementation": "eager",
        "hidden_act": "silu",
        "hidden_size": language.hidden_size,
        "intermediate_size": language.intermediate_size,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_heads,
        "num_key_value_heads": language.num_kv_heads,
        "head_dim": language.head_dim,
        "max_position_embeddings": language.max_positions,
        "rms_norm_eps": language.norm_eps,
        "rope_theta": language.rope_theta,
        "rope_scaling": None if dynamic is None else {"type": "dynamic", "factor": dynamic},
        "tie_word_embeddings": language.tie_embeddings,
        "torch_dtype": dtype_name,
        "vocab_size": language.vocab_size,
    }
    if language.architecture != "Qwen2ForCausalLM":  # Qwen2 has its biases by definition and knows no such field
        section[biased] = language.output_bias
    return section


def _vision(vision: VisionConfig, dtype_name: str) -> dict[str, Any]:
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "attention_dropout": 0.0,
        "drop_path_rate": 0.0,
        "dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": vision.hidden_size,
        "image_size": vision.image_size_px,
        "initializer_factor": vision.layer_scale_init,
        "initializer_range": 0.02,
        "intermediate_size": vision.intermediate_size,
        "layer_norm_eps": vision.norm_eps,
        "norm_type": vision.norm,
        "num_attention_heads": vision.num_heads,
        "num_channels": 3,
        "num_hidden_layers": vision.num_layers,
        "patch_size": vision.patch_size_px,
        "qk_normalization": vision.qk_norm,
        "qkv_bias": vision.qkv_bias,
        "torch_dtype": dtype_name,
        "use_flash_attn": False,
    }


def generation_config(base: dict[str, Any], end_ids: Sequence[int]) -> dict[str, Any]:
    """generation_config.json of the base with every end of a turn among its eos ids; what else it holds stays.

    Without the chat's end token other engines run on past the answer.
    """
    old = base.get("eos_token_id")
    known = old if isinstance(old, list) else [] if old is None else [old]
    return {**base, "eos_token_id": list(dict.fromkeys([*end_ids, *known]))}


def preprocessor_config(config: ModelConfig) -> dict[str, Any]:
    """preprocessor_config.json as the official folders have it."""
    return {
        "crop_size": config.tile_size_px,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
        "resample": 3,
        "size": config.tile_size_px,
    }
