"""What a model is made of: frozen dataclasses, checked where they are made. They are read from files by read.py.

A wrong value is a ConfigError that names the field.
"""

from dataclasses import dataclass, fields

from tessella.errors import ConfigError

# architecture of the language model -> its model_type; Yi and Llama 3 are LlamaForCausalLM
MODEL_TYPES = {
    "InternLM2ForCausalLM": "internlm2",
    "InternLM3ForCausalLM": "internlm3",
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Phi3ForCausalLM": "phi3",
    "MistralForCausalLM": "mistral",
}
# InternLM2 and InternLM3 are Llama by their arithmetic, and transformers knows only the latter.
NATIVE_MODEL_TYPES = {**MODEL_TYPES, "InternLM2ForCausalLM": "llama", "InternLM3ForCausalLM": "llama"}
CONTEXT_TOKENS = 8192  # that the whole family was trained with, prompt plus answer


# Families of models: InternVL and its relatives. Each but the first has one layout of files.
FAMILIES = ("internvl", "llava", "llava_next", "blip2", "instructblip")
TILE_RULES = ("closest", "anyres", "pad", "stretch")  # see image.py
CONNECTORS = ("pixel_shuffle", "linear", "mlp", "pool", "concat", "qformer")  # see model/connectors.py


@dataclass(frozen=True)
class VisionConfig:
    """A plain vision transformer: InternViT as the defaults say, CLIP's by its flags.

    Sizes are counts; norm is "layer_norm" or "rms_norm".
    """

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
    layer_scale: bool = True  # a learned scale of what each half of a layer adds
    pre_norm: bool = False  # a norm between the embeddings and the first layer
    post_norm: str = "none"  # a norm behind the last layer: "none", "unused" (stored, not applied), "used"
    activation: str = "gelu"  # or "quick_gelu": x * sigmoid(1.702 x)
    patch_bias: bool = True
    flat_tables: bool = False  # class token (C,) and positions (P * P + 1, C), not with the axes of length 1 in front
    keep_class_token: bool = False  # among the features, then in front of the patches
    statistics: str = "imagenet"  # by which pixels are normalised: a name in image.STATISTICS

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.activation not in ("gelu", "quick_gelu"):
            raise ConfigError(f'vision_config.hidden_act is "{self.activation}", must be "gelu" or "quick_gelu"')
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
class QFormerConfig:
    """A Q-Former; the numbers of BLIP-2's are those of BERT-base."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_width: int  # of the features that its queries look at
    num_queries: int = 32
    cross_every: int = 2  # layers from one look at the picture to the next; the first one looks
    norm_eps: float = 1e-12
    text: bool = False  # whether it has a half for a text beside the queries
    vocab_size: int = 30522  # of that text
    max_positions: int = 512

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"Q-Former width {self.hidden_size} does not split into {self.num_heads} heads")


@dataclass(frozen=True)
class ConnectorConfig:
    """How a tower's features become tokens for the slots."""

    kind: str = "pixel_shuffle"  # a name in CONNECTORS
    bias: bool = True  # of the linear layers
    factor: int = 2  # side of the square of patches that "pool" averages; "concat" joins factor**2 neighbours of a row
    newline: bool = False  # a learned token behind each row of a picture's patches, for the tile rule "anyres"
    qformer: QFormerConfig | None = None  # for "qformer"

    def __post_init__(self) -> None:
        if self.kind not in CONNECTORS:
            raise ConfigError(f'the connector is a "{self.kind}"; known are {", ".join(CONNECTORS)}')
        if self.factor < 1:
            raise ConfigError(f"the connector's factor is {self.factor}, must be at least 1")
        if (self.kind == "qformer") != (self.qformer is not None):
            raise ConfigError(f'the connector is a "{self.kind}" {"with" if self.qformer else "without"} the sizes of a Q-Former')


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: tower, connector, language model, tile rule and prompt family."""

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
    family: str = "internvl"  # one of FAMILIES
    connector: ConnectorConfig = ConnectorConfig()
    tile_rule: str = "closest"  # one of TILE_RULES
    grids: tuple[tuple[int, int], ...] = ()  # (columns, rows) that "anyres" chooses from, in the order in which ties fall

    def __post_init__(self) -> None:
        if self.pixel_shuffle_version not in ("v1", "v2"):
            raise ConfigError(f'ps_version is "{self.pixel_shuffle_version}", must be "v1" or "v2"')
        if self.downsample_ratio != 0.5:
            raise ConfigError(f"downsample_ratio is {self.downsample_ratio}, we can run 0.5")
        qformer = self.connector.qformer
        if qformer is not None and qformer.image_width != self.vision.hidden_size:
            raise ConfigError(
                f"the Q-Former looks at features {qformer.image_width} wide, but the tower's are {self.vision.hidden_size} wide"
            )
        if self.vision.keep_class_token and qformer is None:
            raise ConfigError(
                f'the connector "{self.connector.kind}" needs a map of patches, and the tower keeps its class token'
            )
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise ConfigError(f"tiles run from {self.min_tiles} to {self.max_tiles}; must be 1 <= min <= max")
        fold = self.vision.patch_size_px * self._fold
        if self.tile_size_px % fold:
            raise ConfigError(
                f"tile size {self.tile_size_px} px must be a multiple of {self._fold} patches of {self.vision.patch_size_px} px"
            )
        if self.tile_rule not in TILE_RULES:
            raise ConfigError(f'the tile rule is "{self.tile_rule}"; known are {", ".join(TILE_RULES)}')
        if (self.tile_rule == "anyres") != bool(self.grids):
            raise ConfigError(f'the tile rule "{self.tile_rule}" has {len(self.grids)} grids; "anyres" needs some, others none')
        if not -self.vision.num_layers - 1 <= self.select_layer <= self.vision.num_layers:
            raise ConfigError(f"select_layer is {self.select_layer}, but the tower has {self.vision.num_layers} layers")

    @property
    def patches_per_side(self) -> int:
        """Patches of a tile side by side."""
        return self.tile_size_px // self.vision.patch_size_px

    @property
    def reads_question(self) -> bool:
        """Whether the connector reads the question beside the picture, so that visual tokens depend on both: InstructBLIP."""
        return self.connector.qformer is not None and self.connector.qformer.text

    @property
    def slots_per_tile(self) -> int:
        """Visual tokens of one tile. InternVL: (tile / patch / 2) squared; 256 at 448 px, 64 at 224 px."""
        if self.connector.qformer is not None:
            return self.connector.qformer.num_queries
        if self.connector.kind == "concat":
            return self.patches_per_side**2 // self.connector.factor**2
        return (self.patches_per_side // self._fold) ** 2

    @property
    def _fold(self) -> int:
        """By how many patches a side of the map must divide."""
        return {"pixel_shuffle": 2, "pool": self.connector.factor, "concat": self.connector.factor}.get(self.connector.kind, 1)


def _check_sizes(part: VisionConfig | LanguageConfig | QFormerConfig) -> None:
    """Every whole number of a part counts something. Raises ConfigError naming one below 1."""
    for field in fields(part):
        value = getattr(part, field.name)
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise ConfigError(f"{field.name} is {value}, must be at least 1; fetch the model's config.json again")
