"""The JSON files of a model folder, made from a ModelConfig: for the official layout and for the native one of transformers.

In: ModelConfig, the ids of the tokens that end a turn.  Out: the dicts of config.json, generation_config.json and the
preprocessor's files; config.model_config is the way back.
Source: configuration_internvl_chat.py and configuration_intern_vit.py of OpenGVLab/InternVL at 2410d1d;
configuration_internvl.py, modeling_rope_utils.py and image_processing_got_ocr2.py of huggingface/transformers at 5.23.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tessella.config import (
    MODEL_TYPES,
    NATIVE,
    NATIVE_MODEL_TYPES,
    OFFICIAL,
    ConnectorConfig,
    LanguageConfig,
    ModelConfig,
    VisionConfig,
    long_attention_factor,
)
from tessella.errors import ConfigError

AUTO_CONFIG = "configuration_internvl_chat.InternVLChatConfig"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def official_config(config: ModelConfig, dtype_name: str) -> dict[str, Any]:
    """config.json. dtype_name: "bfloat16", "float32" or "float16", what the weights are stored in.

    A connector that is not InternVL's is named in our section "tessella"; InternVL's own code cannot open such a folder.
    """
    own = {} if config.connector == ConnectorConfig() else {"tessella": {"connector": asdict(config.connector)}}
    return {
        **own,
        "architectures": [OFFICIAL],
        "auto_map": {
            "AutoConfig": AUTO_CONFIG,
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
        "llm_config": {
            "architectures": [config.language.architecture],
            "model_type": MODEL_TYPES[config.language.architecture],
            "attn_implementation": "eager",
            "torch_dtype": dtype_name,
            **_language(
                config.language, biases="bias" if config.language.architecture == "InternLM2ForCausalLM" else "attention_bias"
            ),
            **_rope(config.language, long_name="su"),
        },
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "drop_path_rate": 0.0,
            "dropout": 0.0,
            "image_size": config.vision.image_size_px,
            "patch_size": config.vision.patch_size_px,
            "initializer_factor": config.vision.layer_scale_init,
            "qk_normalization": config.vision.qk_norm,
            "qkv_bias": config.vision.qkv_bias,
            "torch_dtype": dtype_name,
            "use_flash_attn": False,
            **_vision(config.vision),
        },
    }


def native_config(config: ModelConfig, dtype_name: str, *, image_token_id: int, end_id: int) -> dict[str, Any]:
    """config.json of the native layout. Both key sets for the rotary angles and the type: transformers 4 and 5 read it alike.

    Raises ConfigError for what this layout cannot say and transformers would compute otherwise.
    """
    _refuse_what_native_cannot_say(config)
    language, vision = config.language, config.vision
    dtype = {"dtype": dtype_name, "torch_dtype": dtype_name}
    rope = _rope(language, long_name="longrope")
    scaling: dict[str, Any] = dict(rope["rope_scaling"] or {"type": "default"})
    new = {"rope_type": scaling.pop("type"), "rope_theta": language.rope_theta, **scaling}
    if language.rope_long is not None:
        new["original_max_position_embeddings"] = language.rope_long.original_positions
    kind = NATIVE_MODEL_TYPES[language.architecture]
    return {
        "architectures": [NATIVE],
        "model_type": "internvl",
        **dtype,
        "downsample_ratio": config.downsample_ratio,
        "image_seq_length": config.slots_per_tile,
        "image_token_id": image_token_id,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config.select_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": language.tie_embeddings,
        "text_config": {
            "model_type": kind,
            **dtype,
            **_language(language, biases="attention_bias"),
            **rope,
            "rope_parameters": new,
            "bos_token_id": None,  # the defaults of transformers lie outside small vocabularies
            "eos_token_id": end_id,
            "pad_token_id": None,
            "use_cache": True,
        },
        "vision_config": {
            "model_type": "internvl_vision",
            **dtype,
            "hidden_dropout_prob": 0.0,
            "projection_dropout": 0.0,
            "image_size": [vision.image_size_px] * 2,
            "patch_size": [vision.patch_size_px] * 2,
            "attention_bias": vision.qkv_bias,
            "use_qk_norm": vision.qk_norm,
            "layer_scale_init_value": vision.layer_scale_init,
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": True,
            **_vision(vision),
        },
        "tessella": {  # what the way back to the official layout needs
            "architecture": language.architecture,
            "template": config.template,
            "min_dynamic_patch": config.min_tiles,
            "max_dynamic_patch": config.max_tiles,
            "use_thumbnail": config.use_thumbnail,
        },
    }


def _refuse_what_native_cannot_say(config: ModelConfig) -> None:
    if config.connector != ConnectorConfig():
        raise ConfigError(
            f'the connector is "{config.connector.kind}", and the native layout has pixel shuffle alone; keep the official layout'
        )
    if config.pixel_shuffle_version != "v2":
        raise ConfigError(
            f'ps_version is "{config.pixel_shuffle_version}": its visual tokens lie column by column, which the native layout '
            "cannot say; keep this model in the official layout"
        )
    if not config.use_thumbnail and config.max_tiles > 1:
        raise ConfigError("use_thumbnail is false, and transformers always adds the thumbnail; keep the official layout")
    if config.vision.qk_norm and config.vision.norm_eps != 1e-6:
        raise ConfigError(
            f"layer_norm_eps is {config.vision.norm_eps}, transformers norms q and k with 1e-06; keep the official layout"
        )


def _language(language: LanguageConfig, *, biases: str) -> dict[str, Any]:
    """What both layouts say of the language model. biases: what the layout calls the flag."""
    section = {
        "hidden_act": "silu",
        "hidden_size": language.hidden_size,
        "intermediate_size": language.intermediate_size,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_heads,
        "num_key_value_heads": language.num_kv_heads,
        "head_dim": language.head_dim,
        "max_position_embeddings": language.max_positions,
        "rms_norm_eps": language.norm_eps,
        "tie_word_embeddings": language.tie_embeddings,
        "vocab_size": language.vocab_size,
    }
    if language.architecture in ("Qwen2ForCausalLM", "Phi3ForCausalLM"):  # have their biases, or none, by definition
        return section
    return {**section, biases: language.output_bias}


def _rope(language: LanguageConfig, *, long_name: str) -> dict[str, Any]:
    """The rotary angles in transformers' 4.x keys. long_name: what the layout calls LongRoPE."""
    found: dict[str, Any] = {"rope_theta": language.rope_theta, "rope_scaling": None}
    if language.rope_dynamic_factor is not None:
        found["rope_scaling"] = {"type": "dynamic", "factor": language.rope_dynamic_factor}
    elif language.rope_llama3 is not None:
        rope = language.rope_llama3
        found["rope_scaling"] = {
            "type": "llama3",
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_positions,
        }
    elif language.rope_long is not None:
        long = language.rope_long
        # Phi-3's configuration classes take these three keys and, up to transformers 4, no fourth.
        scaling = {"type": long_name, "short_factor": list(long.short_factor), "long_factor": list(long.long_factor)}
        usual = long_attention_factor(language.max_positions / long.original_positions, long.original_positions)
        found["rope_scaling"] = (
            scaling if long.attention_factor == usual else {**scaling, "attention_factor": long.attention_factor}
        )
        found["original_max_position_embeddings"] = long.original_positions
    return found


def _vision(vision: VisionConfig) -> dict[str, Any]:
    """What both layouts say of the tower in the same words."""
    return {
        "attention_dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": vision.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": vision.intermediate_size,
        "layer_norm_eps": vision.norm_eps,
        "norm_type": vision.norm,
        "num_attention_heads": vision.num_heads,
        "num_channels": 3,
        "num_hidden_layers": vision.num_layers,
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


def native_processor_files(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """The files that tell transformers' InternVLProcessor how to cut pictures into tiles, and how many slots each has."""
    pixels = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
        "processor_class": "InternVLProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": config.tile_size_px, "width": config.tile_size_px},
    }
    tiles = {"crop_to_patches": config.max_tiles > 1, "min_patches": config.min_tiles, "max_patches": config.max_tiles}
    return {
        "preprocessor_config.json": {**pixels, **tiles, "image_processor_type": "GotOcr2ImageProcessor"},
        "video_preprocessor_config.json": {**pixels, "video_processor_type": "InternVLVideoProcessor"},
        "processor_config.json": {"processor_class": "InternVLProcessor", "image_seq_length": config.slots_per_tile},
    }
