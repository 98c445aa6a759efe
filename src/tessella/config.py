"""What a model is made of: frozen dataclasses, read strictly from a checkpoint's config.json.

In: the dict of an official InternVLChatModel config.json.  Out: ModelConfig.
Fields that change the arithmetic are read strictly; the sixty inherited fields of PretrainedConfig are ignored.
Source of the fields: OpenGVLab/InternVL at 2410d1d, configuration_internvl_chat.py and configuration_intern_vit.py.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessella.errors import CheckpointError, ConfigError

LANGUAGE_ARCHITECTURES = ("InternLM2ForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM")


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
        if self.norm not in ("layer_norm", "rms_norm"):
            raise ConfigError(f'vision_config.norm_type is "{self.norm}", must be "layer_norm" or "rms_norm"')
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"vision width {self.hidden_size} does not split into {self.num_heads} heads")
        if self.image_size_px % self.patch_size_px:
            raise ConfigError(f"image size {self.image_size_px} is no multiple of the patch size {self.patch_size_px}")


@dataclass(frozen=True)
class LanguageConfig:
    """One decoder for the InternLM2, Llama and Qwen2 shapes; the differences are flags."""

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
    rope_dynamic_factor: float | None = None  # dynamic NTK beyond max_positions; None: plain RoPE
    max_positions: int = 32768  # trained length in tokens
    qkv_bias: bool = False
    output_bias: bool = False
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.architecture not in LANGUAGE_ARCHITECTURES:
            known = ", ".join(LANGUAGE_ARCHITECTURES)
            raise ConfigError(f'llm_config.architectures is "{self.architecture}"; we can run {known}')
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"{self.num_heads} heads cannot share {self.num_kv_heads} key-value heads evenly")


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


def load_config(folder: Path) -> ModelConfig:
    """Read FOLDER/config.json. Raises CheckpointError when it is missing or no JSON, ConfigError when we cannot run it."""
    return model_config(read_config_json(folder))


def read_config_json(folder: Path) -> dict[str, Any]:
    """The raw dict of FOLDER/config.json. Raises CheckpointError."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no config.json, so it is no model folder; give a folder in the official InternVL2 layout"
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


def model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The dict of an official config.json -> ModelConfig. Raises ConfigError naming the field."""
    architectures = raw.get("architectures") or []
    if "InternVLChatModel" not in architectures:
        raise ConfigError(f'config.json: architectures is {architectures}, must hold "InternVLChatModel"')
    if raw.get("pad2square"):
        raise ConfigError("config.json: pad2square is true; only the tile rule without padding is known")
    vision = vision_config(_section(raw, "vision_config"))
    dynamic = bool(raw.get("dynamic_image_size", True))
    language = language_config(_section(raw, "llm_config"))
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
        context_tokens=min(8192, language.max_positions),
    )


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


def language_config(raw: Mapping[str, Any]) -> LanguageConfig:
    """The llm_config section -> LanguageConfig. Raises ConfigError."""
    where = "llm_config"
    architectures = _need(raw, "architectures", where)
    architecture = str(architectures[0]) if architectures else ""
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise ConfigError(f'{where}.hidden_act is "{activation}", must be "silu"')
    if raw.get("use_sliding_window"):
        raise ConfigError(f"{where}.use_sliding_window is true; sliding windows are not known")
    heads = int(_need(raw, "num_attention_heads", where))
    hidden = int(_need(raw, "hidden_size", where))
    # InternLM2 calls it bias, and its configuration class defaults to True; the others default to False.
    bias = bool(raw.get("bias", True) if architecture == "InternLM2ForCausalLM" else raw.get("attention_bias", False))
    theta, factor = _rope(raw, where)
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
        rope_theta=theta,
        rope_dynamic_factor=factor,
        max_positions=int(_need(raw, "max_position_embeddings", where)),
        qkv_bias=bias or architecture == "Qwen2ForCausalLM",
        output_bias=bias,
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
    )


def _rope(raw: Mapping[str, Any], where: str) -> tuple[float, float | None]:
    """(base, dynamic factor or None), from either transformers' 4.x keys or 5.x's rope_parameters."""
    new = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or (new if new.get("rope_type", "default") != "default" else None)
    theta = raw.get("rope_theta", new.get("rope_theta"))
    if theta is None:
        raise ConfigError(f"{where} names no rope_theta; a wrong base gives wrong answers silently, so it must be there")
    if not scaling:
        return float(theta), None
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind in (None, "default"):
        return float(theta), None
    if kind != "dynamic":
        raise ConfigError(f'{where}.rope_scaling is of type "{kind}", we can run "dynamic" or none')
    return float(theta), float(scaling["factor"])


def _need(raw: Mapping[str, Any], key: str, where: str) -> Any:
    if raw.get(key) is None:
        raise ConfigError(f"{where} has no {key}; fetch the model's config.json again")
    return raw[key]


def _section(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = _need(raw, key, "config.json")
    if not isinstance(section, Mapping):
        raise ConfigError(f"config.json: {key} is a {type(section).__name__}, must be an object")
    return section
