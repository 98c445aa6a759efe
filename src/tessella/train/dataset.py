"""A dataset becomes samples, each accounted for: used, or skipped with its reason.

In: a JSON or JSONL file, or a folder of folders.  Out: Samples (messages and pictures, not yet decoded) and a Ledger.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tessella.chat import Message
from tessella.image import Size
from tessella.inputs import Inputs, Picture
from tessella.train.recipe import Recipe

Split = Literal["train", "held_out", "all"]


@dataclass(frozen=True)
class Sample:
    """One conversation to learn from."""

    place: str  # "file.jsonl:12", or the picture's path in a folder of folders
    messages: tuple[Message, ...]
    pictures: tuple[Picture, ...]
    key: str  # stable: a hash of what the sample says and shows
    sizes: tuple[Size, ...] = ()  # of the pictures, from their headers
    label: str = ""  # class or dish, where the format has one


@dataclass
class Ledger:
    """Every sample of a dataset, used or skipped with its reason."""

    used: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (place, reason)
    notes: list[str] = field(default_factory=list)
    other_split: int = 0  # good samples that belong to the split not asked for

    @property
    def share_bad(self) -> float:
        """Skipped over all."""
        raise NotImplementedError

    def report(self) -> str:
        """What was used and why the rest was not, for people."""
        raise NotImplementedError


@dataclass(frozen=True)
class RecipeData:
    """What a recipe's data fields mean: samples to learn from, samples held out."""

    train: list[Sample]
    held_out: list[Sample]
    ledger: Ledger


def read_dataset(
    path: Path,
    *,
    format: str = "auto",
    image_root: Path | None = None,
    split: Split = "all",
    held_out: float = 0.0,
    seed: int = 0,
    question_language: str = "en",
    questions: tuple[str, ...] = (),
    answer: str = "{name}",
    choices: str = "hidden",
    max_bad_share: float = 0.05,
    inputs: Inputs | None = None,
) -> tuple[list[Sample], Ledger]:
    """Read one split of a dataset; with inputs, over-long samples are refused too."""
    raise NotImplementedError


def read_recipe_data(recipe: Recipe, inputs: Inputs | None = None) -> RecipeData:
    """All datasets of a recipe: the training part (repeated as asked) and the held-out part."""
    raise NotImplementedError
