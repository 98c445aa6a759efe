"""How the model is taught: which part by LoRA, whole or not at all, at which rates, in which steps."""

from dataclasses import dataclass
from typing import Literal

from tessella.errors import ConfigError
from tessella.train.recipe.values import Bounds

LANGUAGE_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOWER_TARGETS = ("qkv", "proj", "fc1", "fc2")
Recomputable = Literal["language", "tower", "language.mlp", "language.attention", "tower.mlp", "tower.attention"]
HEADS = ("lm_head", "output", "embed_tokens", "tok_embeddings")  # no LoRA: a tied head would drag the embeddings along


@dataclass(frozen=True)
class WaysFields:
    """Fields of a Recipe; check_ways() is called where the recipe is made."""

    method: Literal["sft", "dpo", "mpo"] = "sft"
    """What is learned: "sft" the answers; "dpo" to prefer chosen to rejected answers (pairs, docs/finetune.md); "mpo" InternVL's
    mix of preference, quality and generation."""
    beta: float = 0.1
    """dpo and mpo: how strongly a difference from the model before counts as preference."""
    mpo_weights: tuple[float, float, float] = (0.8, 0.2, 1.0)
    """mpo: weights of the losses of preference (DPO), quality (BCO) and generation (the chosen answer's cross-entropy)."""
    language: Literal["lora", "frozen", "full"] = "lora"
    """How the language model is taught."""
    tower: Literal["frozen", "lora", "full"] = "frozen"
    """How the vision tower is taught."""
    projector: Literal["train", "lora", "frozen"] = "train"
    """How the projector between tower and language model is taught; "train": whole."""
    lora_rank: int = 16
    """Rank of the LoRA matrices."""
    lora_alpha: float = 32.0
    """LoRA scale = alpha / rank; with rslora, alpha / square root of rank."""
    rslora: bool = False
    """Rank-stabilised LoRA: a scale that lets large ranks learn as fast as small ones (arXiv:2312.03732)."""
    dora: bool = False
    """DoRA: each row of a changed weight also learns its length (arXiv:2402.09353). Slower; serve runs it merged only."""
    lora_dropout: float = 0.05
    """Dropout before the LoRA matrices."""
    lora_targets: tuple[str, ...] = LANGUAGE_TARGETS
    """Linear layers of the language model that get LoRA, by their last name; never the head."""
    lora_layers: int | None = None
    """Only the last so many layers of the language model get LoRA; default: all. With tower and projector frozen, what the
    layers below say of a sample is computed once and kept: with half of the layers a step costs half."""
    tower_lora_targets: tuple[str, ...] = TOWER_TARGETS
    """Linear layers of the tower that get LoRA when tower is "lora"."""
    quantise: tuple[Literal["language", "tower"], ...] = ()
    """Parts whose frozen linear layers are kept in four bits (QLoRA, NF4): a quarter of bfloat16's memory, slower steps. The
    adapter is taught in full precision and belongs on the unquantised base."""
    further: Literal["on_top", "same"] = "on_top"
    """When model is an adapter: "on_top" merges it in memory and teaches a new one that has it as its base; "same" goes on with
    that adapter itself, and what is written replaces it on its own base."""

    learning_rate: float = 2e-4
    """Peak learning rate."""
    tower_learning_rate: float | None = None
    """Peak learning rate of the tower; default: learning_rate."""
    projector_learning_rate: float | None = None
    """Peak learning rate of the projector; default: learning_rate."""
    projector_warmup_steps: int = 0
    """Before all else, steps of 32 pictures in which the projector alone learns to tell the answers' names from each other, as
    embeddings, without running the language model. For pictures that are called by short names."""
    layer_decay: float = 1.0
    """Each layer's rate is this share of the rate of the layer above it, in language model and tower each; 1: all alike."""
    weight_decay: float = 0.01
    """AdamW weight decay, on matrices only."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""
    warmup_share: float = 0.03
    """Share of all steps in which the learning rate rises; a cosine to 0 follows."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    epochs: float = 1.0
    """Times that the training data is seen."""
    max_steps: int | None = None
    """Stop the schedule at this many optimizer steps, whatever epochs says."""
    samples_per_step: int = 16
    """Samples of one optimizer step, over all passes and devices."""
    tokens_per_pass: int = 8192
    """Most tokens of one forward and backward pass; a step takes as many passes as its samples need."""
    augment: Literal["none", "jpeg", "light", "photo"] = "none"
    """Changes of the pictures while training: "jpeg" compression (quality 75 to 100, as InternVL), "light" crop, small turn and
    colour; "photo" the same and mirror, but never where a sample speaks of left or right, or holds boxes."""
    recompute: tuple[Recomputable, ...] = ()
    """Gradient checkpointing by module: "language", "tower" (whole layers), "language.mlp", "language.attention", "tower.mlp",
    "tower.attention". What is named is computed again in the backward pass instead of kept: less memory, more time."""
    cache_features: bool = True
    """Compute what frozen parts say of a sample once and keep it; off when the tower is taught or pictures are augmented."""
    seed: int = 0
    """Seed of order, initial LoRA, dropout, augmentation and the held-out split."""

    def check_ways(self, *, only_decoders: bool = False) -> None:
        """Raise ConfigError for what no bound and no type catches. only_decoders: decoders learn, and may learn alone."""
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas are {list(self.betas)}, each must be in [0, 1)")
        heads = [name for name in (*self.lora_targets, *self.tower_lora_targets) if name.split(".")[-1] in HEADS]
        if heads:
            raise ConfigError(f"lora_targets names {', '.join(heads)}: head and embeddings take no LoRA; leave them out")
        if self.projector_warmup_steps and (self.projector, self.tower) != ("train", "frozen"):
            raise ConfigError(
                f"projector_warmup_steps is {self.projector_warmup_steps}, but projector is "
                f'"{self.projector}" and tower "{self.tower}"; it goes with projector "train" and tower "frozen"'
            )
        if self.language == "full" and self.projector == "lora":
            raise ConfigError('language is "full", so a whole model is written; teach the projector whole or not at all')
        if self.dora and self.language == "full" and self.tower == "lora":
            raise ConfigError("DoRA on the tower beside a language model that is taught whole is not merged; leave dora out")
        if self.method != "sft" and (only_decoders or self.projector_warmup_steps):
            raise ConfigError(f'method is "{self.method}"; decoders and projector_warmup_steps go with "sft" alone')
        if self.method != "sft" and self.further == "same":
            raise ConfigError(f'method is "{self.method}", whose reference is the model before: say --further on_top, not "same"')
        if any(weight < 0 for weight in self.mpo_weights) or not any(self.mpo_weights):
            raise ConfigError(f"mpo_weights are {list(self.mpo_weights)}, each must be 0 or more, and one above it")
        ways = {"language": self.language, "tower": self.tower}
        whole = [part for part in self.quantise if ways[part] == "full"]
        if whole:
            raise ConfigError(f'quantise names {", ".join(whole)}, which is taught whole, and four bits cannot learn: say "lora"')
        for name in self.recompute:
            part = name.split(".")[0]
            if part == "tower" and self.tower == "frozen":
                raise ConfigError(f'recompute names "{name}", but the tower is frozen and keeps nothing for a backward pass')
            if name != part and part in self.recompute:
                raise ConfigError(f'recompute names "{part}" and "{name}", which lies in it; name one')
        if (self.language == "lora" and not self.lora_targets) or (self.tower == "lora" and not self.tower_lora_targets):
            raise ConfigError('LoRA is asked for, but its targets are empty; name some, or choose "frozen"')
        if (self.language, self.tower, self.projector) == ("frozen", "frozen", "frozen") and not only_decoders:
            raise ConfigError("language, tower and projector are all frozen, so nothing would be learned; teach one of them")

    @property
    def caches_features(self) -> bool:
        """True when what frozen parts say is kept: asked for, tower frozen, pictures not augmented."""
        return self.cache_features and self.tower == "frozen" and self.augment == "none"


WAYS_RANGES = {
    "beta": Bounds(0, above=True),
    "lora_rank": Bounds(1, 4096),
    "lora_layers": Bounds(1),
    "lora_alpha": Bounds(0, above=True),
    "lora_dropout": Bounds(0, 0.99),
    "layer_decay": Bounds(0, 1, above=True),
    "learning_rate": Bounds(0, 1, above=True),
    "tower_learning_rate": Bounds(0, 1, above=True),
    "projector_learning_rate": Bounds(0, 1, above=True),
    "weight_decay": Bounds(0, 1),
    "warmup_share": Bounds(0, 1),
    "projector_warmup_steps": Bounds(0),
    "max_grad_norm": Bounds(0, above=True),
    "epochs": Bounds(0, 10_000, above=True),
    "max_steps": Bounds(1),
    "samples_per_step": Bounds(1),
    "tokens_per_pass": Bounds(64),
    "seed": Bounds(0, 2**32 - 1),
}
# The loss is one mean over the answer tokens of a whole step, so tokens_per_pass changes no gradient beyond rounding and may be
# lowered after an out-of-memory error.
WAYS_FREE_ON_RESUME = ("tokens_per_pass", "cache_features", "recompute")
