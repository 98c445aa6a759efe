"""The config.json of BLIP-2 and InstructBLIP with a language half of the Llama shape -> ModelConfig. MiniGPT-4 is a BLIP-2.

The language halves OPT and Flan-T5 are not run. A BLIP-2 folder says its prompt in our section "tessella"; without it, it
is taken for a MiniGPT-4, which has BLIP-2's tower and Q-Former, one linear layer, and Vicuna. InstructBLIP's Q-Former reads
the question, too.
Source: configuration_blip_2.py and configuration_instructblip.py of huggingface/transformers at 5.23; minigpt4.py of
Vision-CAIR/MiniGPT-4 at d94738a; blip2_vicuna_instruct.py of salesforce/LAVIS.
"""

from collections.abc import Mapping
from typing import Any

from tessella.config.fields import section
from tessella.config.llava import relative_language
from tessella.config.parts import CONTEXT_TOKENS, ConnectorConfig, ModelConfig, QFormerConfig, VisionConfig
from tessella.errors import ConfigError

ARCHITECTURES = {"Blip2ForConditionalGeneration": "blip2", "InstructBlipForConditionalGeneration": "instructblip"}
PROMPTS = {"blip2": "minigpt4", "instructblip": "instructblip"}  # where the folder does not say its own
EVA_DEFAULTS: dict[str, Any] = {"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39}
EVA_DEFAULTS |= {"num_attention_heads": 16, "image_size": 224, "patch_size": 14, "hidden_act": "gelu"}
EVA_DEFAULTS |= {"layer_norm_eps": 1e-6, "qkv_bias": True}
QFORMER_DEFAULTS: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
QFORMER_DEFAULTS |= {"num_attention_heads": 12, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "cross_attention_frequency": 2}
QFORMER_DEFAULTS |= {"use_qformer_text_input": False, "vocab_size": 30522, "max_position_embeddings": 512}


def blip2(raw: Mapping[str, Any], family: str) -> ModelConfig:
    """The dict of a config.json of BLIP-2 ("blip2") or InstructBLIP ("instructblip") -> ModelConfig. Raises ConfigError."""
    own: Mapping[str, Any] = raw.get("tessella") or {}
    vision = eva_config(section(raw, "vision_config"))
    language, _ = relative_language(raw, section(raw, "text_config"))
    former: Mapping[str, Any] = section(raw, "qformer_config")
    if family == "instructblip":
        former = {**former, "use_qformer_text_input": True}
    elif former.get("use_qformer_text_input"):
        raise ConfigError(
            "qformer_config.use_qformer_text_input is true; of the Q-Formers that read the question, InstructBLIP's is run "
            "(InstructBlipForConditionalGeneration)"
        )
    qformer = qformer_config(former, int(raw.get("num_query_tokens") or 32), vision.hidden_size)
    return ModelConfig(
        vision=vision,
        language=language,
        template=str(own.get("template", PROMPTS[family])),
        tile_size_px=vision.image_size_px,
        max_tiles=1,
        use_thumbnail=False,
        context_tokens=min(CONTEXT_TOKENS, language.max_positions),
        family=family,
        connector=ConnectorConfig("qformer", qformer=qformer),
        tile_rule="stretch",
    )


def eva_config(raw: Mapping[str, Any]) -> VisionConfig:
    """The vision_config section of EVA-ViT-g as BLIP-2 uses it, without EVA's last layer. Raises ConfigError."""
    raw = {**EVA_DEFAULTS, **raw}
    return VisionConfig(
        hidden_size=int(raw["hidden_size"]),
        intermediate_size=int(raw["intermediate_size"]),
        num_layers=int(raw["num_hidden_layers"]),
        num_heads=int(raw["num_attention_heads"]),
        image_size_px=int(raw["image_size"]),
        patch_size_px=int(raw["patch_size"]),
        norm_eps=float(raw["layer_norm_eps"]),
        qkv_bias=bool(raw["qkv_bias"]),
        layer_scale=False,
        post_norm="used",
        activation=str(raw["hidden_act"]),
        keep_class_token=True,
        statistics="clip",
    )


def qformer_config(raw: Mapping[str, Any], num_queries: int, image_width: int) -> QFormerConfig:
    """The qformer_config section. Raises ConfigError, also when it is made for another tower."""
    raw = {**QFORMER_DEFAULTS, "encoder_hidden_size": image_width, **raw}
    if raw["hidden_act"] != "gelu":
        raise ConfigError(f'qformer_config.hidden_act is "{raw["hidden_act"]}", must be "gelu"')
    if raw["encoder_hidden_size"] != image_width:
        raise ConfigError(
            f"qformer_config.encoder_hidden_size is {raw['encoder_hidden_size']}, but the tower is {image_width} wide; "
            "config.json must be of one model: fetch it again"
        )
    return QFormerConfig(
        hidden_size=int(raw["hidden_size"]),
        intermediate_size=int(raw["intermediate_size"]),
        num_layers=int(raw["num_hidden_layers"]),
        num_heads=int(raw["num_attention_heads"]),
        image_width=image_width,
        num_queries=num_queries,
        cross_every=int(raw["cross_attention_frequency"]),
        norm_eps=float(raw["layer_norm_eps"]),
        text=bool(raw["use_qformer_text_input"]),
        vocab_size=int(raw["vocab_size"]),
        max_positions=int(raw["max_position_embeddings"]),
    )
