"""The config.json of LLaVA-1.5 and LLaVA-NeXT as transformers writes it -> ModelConfig.

Published folders say only what differs from transformers' defaults, so the defaults stand here too.
Pictures are cut as the models were trained, whatever the preprocessor's file says: LLaVA-1.5 saw padded squares.
Source: configuration_llava.py, configuration_llava_next.py and configuration_clip.py of huggingface/transformers at 5.23;
haotian-liu/LLaVA at c121f04.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tessella.config.fields import section
from tessella.config.language import language_config
from tessella.config.parts import CONTEXT_TOKENS, ConnectorConfig, LanguageConfig, ModelConfig, VisionConfig
from tessella.errors import ConfigError

ARCHITECTURES = {"LlavaForConditionalGeneration": "llava", "LlavaNextForConditionalGeneration": "llava_next"}
GRID_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # (height, width) in px
# model_type of the text_config -> (architecture, prompt family)
LANGUAGES = {"llama": ("LlamaForCausalLM", "vicuna_v1"), "mistral": ("MistralForCausalLM", "mistral_instruct")}
YI_VOCABULARY = 64_000  # LLaVA-NeXT-34B has Yi's, and a prompt of its own
_SEVEN_B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "rope_theta": 1e4, "rms_norm_eps": 1e-6}
TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {**_SEVEN_B, "intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 2048},
    "mistral": {
        **_SEVEN_B,
        "intermediate_size": 14336,
        "vocab_size": 32000,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
}
CLIP_DEFAULTS: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
CLIP_DEFAULTS |= {"num_attention_heads": 12, "image_size": 224, "patch_size": 32, "layer_norm_eps": 1e-5}
CLIP_DEFAULTS |= {"hidden_act": "quick_gelu", "num_channels": 3}


def llava(raw: Mapping[str, Any], family: str) -> ModelConfig:
    """The dict of a config.json of LLaVA-1.5 ("llava") or LLaVA-NeXT ("llava_next"). Raises ConfigError."""
    fixed = {"vision_feature_select_strategy": "default", "projector_hidden_act": "gelu"}
    for key, value in fixed.items():
        if raw.get(key, value) != value:
            raise ConfigError(f'config.json: {key} is "{raw[key]}", must be "{value}"')
    vision = clip_config(section(raw, "vision_config"))
    language, template = relative_language(raw, section(raw, "text_config"))
    layer = raw.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise ConfigError(f"config.json: vision_feature_layer is {layer}, must be one number")
    points = raw.get("image_grid_pinpoints") or GRID_PINPOINTS
    grids = grids_of(points, vision) if family == "llava_next" else ()
    return ModelConfig(
        vision=vision,
        language=language,
        template=template,
        tile_size_px=vision.image_size_px,
        select_layer=layer,
        max_tiles=max((columns * rows for columns, rows in grids), default=1),
        use_thumbnail=False,
        context_tokens=min(CONTEXT_TOKENS, language.max_positions),
        family=family,
        connector=ConnectorConfig("mlp", bool(raw.get("multimodal_projector_bias", True)), newline=family == "llava_next"),
        tile_rule="anyres" if family == "llava_next" else "pad",
        grids=grids,
    )


def clip_config(raw: Mapping[str, Any]) -> VisionConfig:
    """The vision_config section of a CLIP tower. Raises ConfigError."""
    kind = raw.get("model_type", "clip_vision_model")
    if kind != "clip_vision_model":
        raise ConfigError(f'vision_config.model_type is "{kind}", must be "clip_vision_model"')
    raw = {**CLIP_DEFAULTS, **raw}
    if raw["num_channels"] != 3:
        raise ConfigError(f"vision_config.num_channels is {raw['num_channels']}, must be 3")
    return VisionConfig(
        hidden_size=int(raw["hidden_size"]),
        intermediate_size=int(raw["intermediate_size"]),
        num_layers=int(raw["num_hidden_layers"]),
        num_heads=int(raw["num_attention_heads"]),
        image_size_px=int(raw["image_size"]),
        patch_size_px=int(raw["patch_size"]),
        norm_eps=float(raw["layer_norm_eps"]),
        layer_scale=False,
        pre_norm=True,
        post_norm="unused",  # CLIP's own output is normed; LLaVA takes a layer before that
        activation=str(raw["hidden_act"]),
        patch_bias=False,
        flat_tables=True,
        statistics="clip",
    )


def relative_language(raw: Mapping[str, Any], text: Mapping[str, Any]) -> tuple[LanguageConfig, str]:
    """The language model of a relative, and its prompt family. Raises ConfigError."""
    kind = str(text.get("model_type", "llama"))
    if kind not in LANGUAGES:
        raise ConfigError(f'text_config.model_type is "{kind}"; we can run {", ".join(LANGUAGES)}')
    architecture, template = LANGUAGES[kind]
    defaults = dict(TEXT_DEFAULTS[kind])
    if text.get("rope_parameters") or text.get("rope_theta") is not None:
        del defaults["rope_theta"]
    tied = bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    language = language_config({**defaults, **text, "tie_word_embeddings": tied}, architecture, "text_config")
    if kind == "llama" and language.vocab_size >= YI_VOCABULARY:
        raise ConfigError(
            f"text_config.vocab_size is {language.vocab_size:,}: a LLaVA with Yi's vocabulary, whose prompt we do not know; "
            "take one with Vicuna or Mistral"
        )
    return language, template


def grids_of(points: Sequence[Sequence[int]], vision: VisionConfig) -> tuple[tuple[int, int], ...]:
    """image_grid_pinpoints, (height, width) in px -> (columns, rows) of tiles. Raises ConfigError."""
    side = vision.image_size_px
    grids = []
    for point in points:
        if len(point) != 2 or any(length < side or length % side for length in point):
            raise ConfigError(
                f"image_grid_pinpoints holds {list(point)}, must be (height, width), each a multiple of the tile's {side} px "
                f"and so of the tower's patch of {vision.patch_size_px} px"
            )
        grids.append((point[1] // side, point[0] // side))
    return tuple(grids)
