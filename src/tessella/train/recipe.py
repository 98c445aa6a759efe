"""A recipe: every choice of a training run, flat and frozen, checked where it is made.

In: a TOML file (flat, one key a field) and what the command line overrides.  Out: Recipe.
Each field is also a flag of `tessella finetune`; its docstring is the flag's help.  Paths are relative to where the command runs.
"""

import difflib
import hashlib
import json
import tomllib
import types
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tessella.errors import ConfigError

LANGUAGE_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOWER_TARGETS = ("qkv", "proj", "fc1", "fc2")
HEADS = ("lm_head", "output", "embed_tokens", "tok_embeddings")  # no LoRA: a tied head would drag the embeddings along


@dataclass(frozen=True)
class Recipe:
    """What to teach, from what, and how."""

    model: str = "tessella-nano"
    """Model folder in the official layout, or "tessella-nano", the built-in one."""
    data: tuple[Path, ...] = ()
    """Datasets: JSON, JSONL, or a folder whose folders are classes."""
    format: Literal["auto", "llava", "openai", "folder", "foodieqa"] = "auto"
    """Format of the data; "auto" looks at each row."""
    image_root: Path | None = None
    """Folder that picture paths start from; default: where the data file lies."""
    repeat: tuple[float, ...] = ()
    """How often each dataset is seen in an epoch, one number a dataset (0.5 = a seeded half); empty: once each."""
    question_language: Literal["auto", "en", "zh", "both"] = "auto"
    """Language of the questions made for a folder of classes (auto: that of the names) and for FoodieQA (auto: Chinese)."""
    questions: tuple[str, ...] = ()
    """Your own questions for a folder of classes, in place of the built-in phrasings."""
    answer: str = "{name}"
    """Answer made for a folder of classes; {name} stands for the class."""
    choices: Literal["hidden", "shown", "both"] = "hidden"
    """FoodieQA: the choices are hidden (answer in words, as the tutorial does), shown (answer a letter), or both."""
    held_out: float = 0.1
    """Samples of each dataset never trained on: a share below 1, or a count; whole dishes or pictures, fixed by the seed."""
    held_out_data: tuple[Path, ...] = ()
    """Datasets to score on in place of a held-out part of the data."""
    max_bad_share: float = 0.05
    """Stop when more than this share of the samples is bad."""
    system: str | None = None
    """System message; default: the one of the model's template."""
    max_tiles: int | None = None
    """Most tiles a picture is cut into (1 to 40); default: what the model says."""
    limit_megapixels: float = 100.0
    """Largest picture that is opened; a larger one is a bad sample."""
    context_tokens: int | None = None
    """Longest sample in tokens, pictures included; default: what the model says."""

    language: Literal["lora", "frozen", "full"] = "lora"
    """How the language model is taught."""
    tower: Literal["frozen", "lora", "full"] = "frozen"
    """How the vision tower is taught."""
    projector: Literal["train", "frozen"] = "train"
    """Whether the projector between tower and language model is taught."""
    lora_rank: int = 16
    """Rank of the LoRA matrices."""
    lora_alpha: float = 32.0
    """LoRA scale = alpha / rank."""
    lora_dropout: float = 0.05
    """Dropout before the LoRA matrices."""
    lora_targets: tuple[str, ...] = LANGUAGE_TARGETS
    """Linear layers of the language model that get LoRA, by their last name; never the head."""
    lora_layers: int | None = None
    """Only the last so many layers of the language model get LoRA; default: all. With tower and projector frozen, what the
    layers below say of a sample is computed once and kept: with half of the layers a step costs half."""
    tower_lora_targets: tuple[str, ...] = TOWER_TARGETS
    """Linear layers of the tower that get LoRA when tower is "lora"."""

    learning_rate: float = 2e-4
    """Peak learning rate."""
    tower_learning_rate: float | None = None
    """Peak learning rate of the tower; default: learning_rate."""
    projector_learning_rate: float | None = None
    """Peak learning rate of the projector; default: learning_rate."""
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
    augment: Literal["none", "light", "photo"] = "none"
    """Changes of the pictures while training: "light" crop, small turn and colour; "photo" the same and mirror."""
    cache_features: bool = True
    """Compute what frozen parts say of a sample once and keep it; off when the tower is taught or pictures are augmented."""
    seed: int = 0
    """Seed of order, initial LoRA, dropout, augmentation and the held-out split."""

    device: str = "auto"
    """"auto", "cpu", "cuda", "cuda:1" or "mps"."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of the arithmetic; "auto": bfloat16 where the device has it."""
    compile: bool = False
    """Compile the model with torch.compile (CUDA only pays)."""
    workers: int = 2
    """Processes that read and cut pictures ahead of a GPU; on the CPU they would only take its cores, and none is used."""
    output: Path = Path("runs/finetune")
    """Folder of adapter, checkpoints and logs."""
    resume: bool = False
    """Go on from the newest checkpoint in the output folder."""
    time_limit_s: float | None = None
    """Stop and save after this many seconds; resume goes on."""
    evaluate_every: int = 100
    """Held-out loss and sample answers every so many steps; 0: at the end only."""
    sample_answers: int = 4
    """Held-out questions that are answered each time."""
    save_every: int = 200
    """Checkpoint every so many steps; 0: at the end only."""
    keep: int = 2
    """Checkpoints kept; older ones are removed."""
    report_every: int = 10
    """Loss, tokens/s and memory are logged every so many steps."""
    tensorboard: bool = True
    """Write TensorBoard logs beside the JSON lines."""

    def __post_init__(self) -> None:
        for name, hint in _hints().items():
            value = getattr(self, name)
            _check_type(name, value, hint)
            if isinstance(value, int) and float in _alternatives(hint):
                object.__setattr__(self, name, float(value))  # 1 and 1.0 are one recipe and have one fingerprint
        for name, bounds in RANGES.items():
            bounds.check(name, getattr(self, name))
        if self.repeat and len(self.repeat) != len(self.data):
            raise ConfigError(f"repeat has {len(self.repeat)} numbers for {len(self.data)} datasets; give one each, or none")
        if any(share < 0 for share in self.repeat):
            raise ConfigError(f"repeat is {list(self.repeat)}, each must be 0 or more")
        if self.held_out >= 1 and self.held_out != int(self.held_out):
            raise ConfigError(f"held_out is {self.held_out}: give a share below 1, such as 0.1, or a whole number of samples")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas are {list(self.betas)}, each must be in [0, 1)")
        if "{name}" not in self.answer:
            raise ConfigError(f'answer is "{self.answer}", must hold {{name}}, where the class name goes')
        heads = [name for name in (*self.lora_targets, *self.tower_lora_targets) if name.split(".")[-1] in HEADS]
        if heads:
            raise ConfigError(f"lora_targets names {', '.join(heads)}: head and embeddings take no LoRA; leave them out")
        if (self.language == "lora" and not self.lora_targets) or (self.tower == "lora" and not self.tower_lora_targets):
            raise ConfigError('LoRA is asked for, but its targets are empty; name some, or choose "frozen"')
        if (self.language, self.tower, self.projector) == ("frozen", "frozen", "frozen"):
            raise ConfigError("language, tower and projector are all frozen, so nothing would be learned; teach one of them")

    @property
    def caches_features(self) -> bool:
        """True when what frozen parts say is kept: asked for, tower frozen, pictures not augmented."""
        return self.cache_features and self.tower == "frozen" and self.augment == "none"

    def settled(self) -> dict[str, Any]:
        """The fields that must not change on resume, as plain JSON values."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self) if field.name not in FREE_ON_RESUME}

    def fingerprint(self) -> str:
        """Hash of settled(): equal for runs that may go on from each other."""
        return hashlib.sha256(json.dumps(self.settled(), sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]

    def changes_from(self, settled: Mapping[str, Any]) -> tuple[str, ...]:
        """What differs from the settled() of an earlier run: "learning_rate was 0.0002, is 0.0001"."""
        mine = self.settled()
        names = sorted(mine.keys() | settled.keys())
        return tuple(f"{n} was {settled.get(n)}, is {mine.get(n)}" for n in names if settled.get(n) != mine.get(n))

    def to_toml(self) -> str:
        """The recipe as TOML that load_recipe reads back to an equal one; fields that are None are left out."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return "".join(f"{name} = {_toml(value)}\n" for name, value in values if value is not None)


# May differ between a run and its resumption: where it runs, how it is cut into passes, what is written. The loss is one mean
# over the answer tokens of a whole step, so tokens_per_pass changes no gradient beyond rounding and may be lowered after an
# out-of-memory error.
FREE_ON_RESUME = frozenset((
    "output", "resume", "device", "compile", "workers", "tokens_per_pass", "cache_features", "time_limit_s", "max_bad_share",
    "limit_megapixels",
    "evaluate_every", "sample_answers", "save_every", "keep", "report_every", "tensorboard",
))  # fmt: skip


@dataclass(frozen=True)
class Bounds:
    """low <= value <= high, or low < value when above is set."""

    low: float
    high: float = float("inf")
    above: bool = False

    def check(self, name: str, value: float | None) -> None:
        """Raise ConfigError when value (not None) lies outside."""
        if value is None or ((self.low < value if self.above else self.low <= value) and value <= self.high):
            return
        low = f"above {self.low:g}" if self.above else f"{self.low:g} or more"
        high = f", and at most {self.high:g}" if self.high != float("inf") else ""
        raise ConfigError(f"{name} is {value}, must be {low}{high}")


RANGES = {
    "held_out": Bounds(0),
    "max_bad_share": Bounds(0, 1),
    "max_tiles": Bounds(1, 40),
    "limit_megapixels": Bounds(0, above=True),
    "context_tokens": Bounds(16),
    "lora_rank": Bounds(1, 4096),
    "lora_layers": Bounds(1),
    "lora_alpha": Bounds(0, above=True),
    "lora_dropout": Bounds(0, 0.99),
    "learning_rate": Bounds(0, 1, above=True),
    "tower_learning_rate": Bounds(0, 1, above=True),
    "projector_learning_rate": Bounds(0, 1, above=True),
    "weight_decay": Bounds(0, 1),
    "warmup_share": Bounds(0, 1),
    "max_grad_norm": Bounds(0, above=True),
    "epochs": Bounds(0, 10_000, above=True),
    "max_steps": Bounds(1),
    "samples_per_step": Bounds(1),
    "tokens_per_pass": Bounds(64),
    "seed": Bounds(0, 2**32 - 1),
    "workers": Bounds(0, 256),
    "time_limit_s": Bounds(0, above=True),
    "evaluate_every": Bounds(0),
    "sample_answers": Bounds(0),
    "save_every": Bounds(0),
    "keep": Bounds(1),
    "report_every": Bounds(1),
}


WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path", types.NoneType: "left out"}


def load_recipe(path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe from TOML (or the defaults when path is None) and set the overrides, field name -> value.

    Raises ConfigError: no such file, broken TOML (with line), unknown key (with the nearest known one), wrong type, out of range.
    """
    raw = {} if path is None else _read_toml(path)
    where = "overrides" if path is None else str(path)
    hints = _hints()
    for key in (*raw, *(overrides or {})):
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
            hint = f'; did you mean "{near[0]}"?' if near else f"; known are {', '.join(hints)}"
            raise ConfigError(f'{where}: unknown key "{key}"{hint}')
    values = {**raw, **(overrides or {})}
    return Recipe(**{name: _from_toml(value, hints[name]) for name, value in values.items()})


def _read_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such recipe; give a TOML file")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error


def _hints() -> dict[str, Any]:
    return get_type_hints(Recipe)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _from_toml(value: Any, hint: Any) -> Any:
    """TOML's own types -> the field's: list -> tuple, str -> Path, int -> float. What does not fit is left for the type check."""
    kinds = _alternatives(hint)
    if isinstance(value, str) and Path in kinds:
        return Path(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds:
        return float(value)
    if isinstance(value, list | tuple) and get_origin(hint) is tuple:
        return tuple(_from_toml(item, get_args(hint)[0]) for item in value)
    return value


def _check_type(name: str, value: Any, hint: Any) -> None:
    if not any(_is(value, kind) for kind in _alternatives(hint)):
        raise ConfigError(f"{name} is {value!r}, must be {_name(hint)}")


def _is(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind) and isinstance(value, str)
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        fits = inner[-1] is Ellipsis or (isinstance(value, tuple) and len(value) == len(inner))
        return isinstance(value, tuple) and fits and all(_is(item, inner[0]) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and value == value  # a NaN is no number to run with
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(f'"{choice}"' for choice in get_args(hint))
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        return f"a list of {_name(inner[0])}" if inner[-1] is Ellipsis else f"a list of {len(inner)} {_name(inner[0])}s"
    return " or ".join(WORDS[kind] if kind in WORDS else _name(kind) for kind in _alternatives(hint))


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML takes JSON's escapes; DEL must be one
    return repr(value)
