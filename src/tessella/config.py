"""What a model is made of: frozen dataclasses, read strictly from a checkpoint's config.json.

In: the dict of a config.json, official (InternVLChatModel) or native (InternVLForConditionalGeneration).  Out: ModelConfig.
Fields that change the arithmetic are read strictly; the sixty inherited fields of PretrainedConfig are ignored.
Source of the fields: OpenGVLab/InternVL at 2410d1d, configuration_internvl_chat.py and configuration_intern_vit.py;
configuration_internvl.py and modeling_rope_utils.py of huggingface/transformers at 5.23.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tessella.errors import CheckpointError, ConfigError

OFFICIAL, NATIVE = "InternVLChatModel", "InternVLForConditionalGeneration"
# architecture of the language model -> its model_type; Yi and Llama 3 are LlamaForCausalLM
MODEL_TYPES = {
    "InternLM2ForCausalLM": "internlm2",
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Phi3ForCausalLM": "phi3",
}
# InternLM2 is Llama by its arithmetic, and transformers knows only the latter.
NATIVE_MODEL_TYPES = {**MODEL_TYPES, "InternLM2ForCausalLM": "llama"}
CONTEXT_TOKENS = 8192  # that the whole family was trained with, prompt plus answer


@dataclass(frozen=True)
class VisionConfig:
    """InternViT. Sizes are counts; norm is "layer_norm" or "rms_norm"."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size_px: int = 448  # side of the picture that the position table was made for
    patch_size_px: int = 14
    norm: str = "layer_norm"
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    qk_norm: bool = False  # RMSNorm over the whole width of q and of k, before the heads are split
    layer_scale_init: float = 1.0

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.norm not in ("layer_norm", "rms_norm"):
            raise ConfigError(f'vision_config.norm_type is "{self.norm}", must be "layer_norm" or "rms_norm"')
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"vision width {self.hidden_size} does not split into {self.num_heads} heads")
        if self.image_size_px % self.patch_size_px:
            raise ConfigError(f"image size {self.image_size_px} is no multiple of the patch size {self.patch_size_px}")


@dataclass(frozen=True)
class LongRope:
    """Phi-3's rotary angles ("longrope", once "su"): each frequency is divided by a factor of its own, D / 2 of them."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]  # beyond original_positions tokens
    original_positions: int
    attention_factor: float  # cosine and sine are multiplied by it


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's rotary angles: slow frequencies are divided by factor, fast ones are not, between them it is blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True)
class LanguageConfig:
    """One decoder for the InternLM2, Llama, Qwen2, Qwen3 and Phi-3 shapes; the differences are flags."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float = 1e-5
    rope_theta: float = 1e6
    # At most one of the next three changes the plain rotary angles.
    rope_dynamic_factor: float | None = None  # dynamic NTK beyond max_positions
    rope_long: LongRope | None = None
    rope_llama3: Llama3Rope | None = None
    max_positions: int = 32768  # trained length in tokens
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and of k
    output_bias: bool = False
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.architecture not in MODEL_TYPES:
            raise ConfigError(f'the language model is a "{self.architecture}"; we can run {", ".join(MODEL_TYPES)}')
        _check_sizes(self)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"{self.num_heads} heads cannot share {self.num_kv_heads} key-value heads evenly")
        if sum(rope is not None for rope in (self.rope_dynamic_factor, self.rope_long, self.rope_llama3)) > 1:
            raise ConfigError("rope_scaling: a language model has one kind of rotary angles, not several")
        long = self.rope_long
        if long is not None and {len(long.short_factor), len(long.long_factor)} != {self.head_dim // 2}:
            counts = f"{len(long.short_factor)} short and {len(long.long_factor)} long factors"
            raise ConfigError(f"rope_scaling has {counts}, must have {self.head_dim // 2} = half a head's width of each")

    @property
    def unstretched_tokens(self) -> int:
        """Length up to which a row's rotary angles do not depend on its length."""
        return self.max_positions if self.rope_long is None else self.rope_long.original_positions


@dataclass(frozen=True)
class ModelConfig:
    """A whole InternVL model: tower, connector, language model, tile rule and prompt family."""

    vision: VisionConfig
    language: LanguageConfig
    template: str  # a name in chat.TEMPLATES
    tile_size_px: int = 448
    downsample_ratio: float = 0.5
    pixel_shuffle_version: str = "v2"
    select_layer: int = -1
    min_tiles: int = 1
    max_tiles: int = 12
    use_thumbnail: bool = True
    context_tokens: int = 8192  # prompt plus answer

    def __post_init__(self) -> None:
        if self.pixel_shuffle_version not in ("v1", "v2"):
            raise ConfigError(f'ps_version is "{self.pixel_shuffle_version}", must be "v1" or "v2"')
        if self.downsample_ratio != 0.5:
            raise ConfigError(f"downsample_ratio is {self.downsample_ratio}, we can run 0.5")
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise ConfigError(f"tiles run from {self.min_tiles} to {self.max_tiles}; must be 1 <= min <= max")
        if self.tile_size_px % (2 * self.vision.patch_size_px):
            raise ConfigError(
                f"tile size {self.tile_size_px} px must be a multiple of twice the patch size {self.vision.patch_size_px} px"
            )
        if not -self.vision.num_layers - 1 <= self.select_layer <= self.vision.num_layers:
            raise ConfigError(f"select_layer is {self.select_layer}, but the tower has {self.vision.num_layers} layers")

    @property
    def slots_per_tile(self) -> int:
        """Visual tokens of one tile: (tile / patch / 2) squared; 256 at 448 px, 64 at 224 px."""
        return (self.tile_size_px // self.vision.patch_size_px // 2) ** 2


def _check_sizes(part: VisionConfig | LanguageConfig) -> None:
    """Every whole number of a part counts something. Raises ConfigError naming one below 1."""
    for field in fields(part):
        value = getattr(part, field.name)
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise ConfigError(f"{field.name} is {value}, must be at least 1; fetch the model's config.json again")


def load_config(folder: Path) -> ModelConfig:
    """Read FOLDER/config.json. Raises CheckpointError when it is missing or no JSON, ConfigError when we cannot run it."""
    return model_config(read_config_json(folder))


def read_config_json(folder: Path) -> dict[str, Any]:
    """The raw dict of FOLDER/config.json. Raises CheckpointError."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no config.json, so it is no model folder; give one in the official or the native layout"
        )
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file of a model folder holds. Raises CheckpointError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); fetch the file again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds a {type(raw).__name__}, must be an object")
    return raw


def is_native(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is of the native layout; False is the official one. Raises ConfigError for any other model."""
    architectures = raw.get("architectures") or []
    if NATIVE not in architectures and OFFICIAL not in architectures:
        raise ConfigError(
            f"config.json: architectures is {architectures}; we can run {OFFICIAL} (official layout) and {NATIVE} (native layout)"
        )
    return NATIVE in architectures


def model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The dict of a config.json, official or native -> ModelConfig. Raises ConfigError naming the field."""
    return _native(raw) if is_native(raw) else _official(raw)


def _official(raw: Mapping[str, Any]) -> ModelConfig:
    """The dict of an official config.json -> ModelConfig. Raises ConfigError."""
    if raw.get("pad2square"):
        raise ConfigError("config.json: pad2square is true; only the tile rule without padding is known")
    vision = vision_config(_section(raw, "vision_config"))
    dynamic = bool(raw.get("dynamic_image_size", True))
    section = _section(raw, "llm_config")
    architectures = _need(section, "architectures", "llm_config")
    language = language_config(section, str(architectures[0]) if architectures else "", "llm_config")
    return ModelConfig(
        vision=vision,
        language=language,
        template=str(_need(raw, "template", "config.json")),
        tile_size_px=int(raw.get("force_image_size") or vision.image_size_px),
        downsample_ratio=float(raw.get("downsample_ratio", 0.5)),
        pixel_shuffle_version=str(raw.get("ps_version", "v1")),
        select_layer=int(raw.get("select_layer", -1)),
        min_tiles=int(raw.get("min_dynamic_patch", 1)) if dynamic else 1,
        max_tiles=int(raw.get("max_dynamic_patch", 12)) if dynamic else 1,
        use_thumbnail=bool(raw.get("use_thumbnail", True)),
        context_tokens=min(CONTEXT_TOKENS, language.max_positions),
    )


def _native(raw: Mapping[str, Any]) -> ModelConfig:
    """The dict of a native config.json -> ModelConfig. Raises ConfigError.

    What this layout cannot say stands in our section "tessella". A folder of others lacks it: its prompt is InternVL 2.5's,
    which 3 and 3.5 share, and its tile rule the family's.
    """
    fixed = {"vision_feature_select_strategy": "default", "projector_hidden_act": "gelu"}
    for key, value in fixed.items():
        if raw.get(key, value) != value:
            raise ConfigError(f'config.json: {key} is "{raw[key]}", must be "{value}"')
    own: Mapping[str, Any] = raw.get("tessella") or {}
    vision = vision_config(_as_official_vision(_section(raw, "vision_config")))
    text = _section(raw, "text_config")
    kind = str(_need(text, "model_type", "text_config"))
    usual = next((name for name, known in MODEL_TYPES.items() if known == kind), f"{kind} (text_config.model_type)")
    architecture = str(own.get("architecture") or usual)
    if NATIVE_MODEL_TYPES.get(architecture, kind) != kind:
        raise ConfigError(f'config.json: tessella.architecture is "{architecture}", but text_config.model_type is "{kind}"')
    section = {"tie_word_embeddings": raw.get("tie_word_embeddings", False), **NATIVE_TEXT_DEFAULTS.get(kind, {}), **text}
    if "rope_theta" not in (text.get("rope_parameters") or text):
        section["rope_theta"] = NATIVE_ROPE_THETA
    language = language_config(section, architecture, "text_config")
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
        hidden_size=int(_need(raw, "hidden_size", where)),
        intermediate_size=int(_need(raw, "intermediate_size", where)),
        num_layers=int(_need(raw, "num_hidden_layers", where)),
        num_heads=int(_need(raw, "num_attention_heads", where)),
        image_size_px=int(_need(raw, "image_size", where)),
        patch_size_px=int(_need(raw, "patch_size", where)),
        norm=str(raw.get("norm_type", "layer_norm")),
        norm_eps=float(raw.get("layer_norm_eps", 1e-6)),
        qkv_bias=bool(_need(raw, "qkv_bias", where)),
        qk_norm=bool(raw.get("qk_normalization", False)),
        layer_scale_init=float(raw.get("initializer_factor", 1.0)),
    )


def language_config(raw: Mapping[str, Any], architecture: str, where: str) -> LanguageConfig:
    """The section of the language model -> LanguageConfig. Raises ConfigError."""
    _refuse_unknown_arithmetic(raw, where)
    heads = int(_need(raw, "num_attention_heads", where))
    hidden = int(_need(raw, "hidden_size", where))
    # InternLM2 calls it bias, and its configuration class defaults to True; the others default to False.
    official_internlm2 = architecture == "InternLM2ForCausalLM" and where == "llm_config"
    bias = bool(raw.get("bias", True) if official_internlm2 else raw.get("attention_bias", False))
    qwen2 = architecture == "Qwen2ForCausalLM"  # has biases on q, k, v and none on the output, by definition
    return LanguageConfig(
        architecture=architecture,
        vocab_size=int(_need(raw, "vocab_size", where)),
        hidden_size=hidden,
        intermediate_size=int(_need(raw, "intermediate_size", where)),
        num_layers=int(_need(raw, "num_hidden_layers", where)),
        num_heads=heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or hidden // heads),
        norm_eps=float(_need(raw, "rms_norm_eps", where)),
        max_positions=int(_need(raw, "max_position_embeddings", where)),
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
    if raw.get("mlp_bias"):
        raise ConfigError(f"{where}.mlp_bias is true, must be false")
    # Phi-3 has a window but no switch for it; Qwen's switch is off unless said. Wider than a prompt, a window does nothing.
    window, switched_on = raw.get("sliding_window"), raw.get("use_sliding_window", raw.get("model_type") == "phi3")
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
        factor, low, high = (float(_need(scaling, key, f"{where}.rope_scaling")) for key in keys)
        return {**found, "rope_llama3": Llama3Rope(factor, low, high, int(original or raw["max_position_embeddings"]))}
    if kind != "default":
        raise ConfigError(f'{where}.rope_scaling is of type "{kind}", we can run "dynamic", "longrope" ("su"), "llama3" or none')
    return found


def _long_rope(scaling: Mapping[str, Any], raw: Mapping[str, Any], original: int) -> LongRope:
    short, long = (
        tuple(float(x) for x in _need(scaling, key, "rope_scaling of Phi-3")) for key in ("short_factor", "long_factor")
    )
    factor = float(scaling.get("factor") or int(raw["max_position_embeddings"]) / original)
    return LongRope(short, long, original, float(scaling.get("attention_factor") or long_attention_factor(factor, original)))


def long_attention_factor(factor: float, original: int) -> float:
    """What LongRope's attention_factor is where a config does not say it; factor: by how much the length was stretched."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _need(raw: Mapping[str, Any], key: str, where: str) -> Any:
    if raw.get(key) is None:
        raise ConfigError(f"{where} has no {key}; fetch the model's config.json again")
    return raw[key]


def _section(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = _need(raw, key, "config.json")
    if not isinstance(section, Mapping):
        raise ConfigError(f"config.json: {key} is a {type(section).__name__}, must be an object")
    return section
