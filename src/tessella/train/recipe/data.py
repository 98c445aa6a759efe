"""What a run is taught from: the model, the datasets, the part that is held out, and how long a sample may be."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tessella.errors import ConfigError
from tessella.train.recipe.values import Bounds


@dataclass(frozen=True)
class DataFields:
    """Fields of a Recipe; check_data() is called where the recipe is made."""

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

    def check_data(self) -> None:
        """Raise ConfigError for what no bound and no type catches."""
        if self.repeat and len(self.repeat) != len(self.data):
            raise ConfigError(f"repeat has {len(self.repeat)} numbers for {len(self.data)} datasets; give one each, or none")
        if any(share < 0 for share in self.repeat):
            raise ConfigError(f"repeat is {list(self.repeat)}, each must be 0 or more")
        if self.held_out >= 1 and self.held_out != int(self.held_out):
            raise ConfigError(f"held_out is {self.held_out}: give a share below 1, such as 0.1, or a whole number of samples")
        if "{name}" not in self.answer:
            raise ConfigError(f'answer is "{self.answer}", must hold {{name}}, where the class name goes')


DATA_RANGES = {
    "held_out": Bounds(0),
    "max_bad_share": Bounds(0, 1),
    "max_tiles": Bounds(1, 40),
    "limit_megapixels": Bounds(0, above=True),
    "context_tokens": Bounds(16),
}
DATA_FREE_ON_RESUME = ("max_bad_share", "limit_megapixels")
