"""What a run is taught from: the model, the datasets, the part that is held out, and how long a sample may be."""

import difflib
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
    """Datasets: JSON, JSONL, InternVL's meta JSON, parquet, WebDataset tars, hf:NAME, or a folder whose folders are classes."""
    format: Literal["auto", "llava", "openai", "folder", "foodieqa"] = "auto"
    """Format of the data; "auto" looks at each row."""
    columns: tuple[str, ...] = ()
    """Columns that go by other names, "image=photo" "question=asked" "answer=said"; also images, video, class, conversations,
    messages, system."""
    boxes: Literal["thousandths", "pixels"] = "thousandths"
    """What the numbers in <box> count: thousandths of the picture, as the model is taught, or pixels, to be made thousandths."""
    video_frames: int = 8
    """Frames that a video is shown as, evenly over its length, one tile each."""
    stream: bool = False
    """Leave the data on the disk (or the hub) and read each row when its step comes; for sets larger than memory."""
    image_root: Path | None = None
    """Folder that picture paths start from; default: where the data file lies."""
    repeat: tuple[float, ...] = ()
    """How often each dataset is seen in an epoch, one number a dataset (0.5 = a seeded half); empty: once each."""
    weights: tuple[float, ...] = ()
    """Shares of the datasets in an epoch, one number a dataset, whatever their sizes; in place of repeat."""
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
    packing: Literal["best_fit", "in_order", "grouped"] = "best_fit"
    """How the rows of a step share its passes: fullest passes first, the order of the rows, or steps of rows of one length."""
    preflight_s: float = 10.0
    """Seconds that the look at the pictures before a run (twins, pictures on both sides of the split) may take; 0: none."""
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
        self._check_mixture()
        self._check_columns()
        if self.stream and self.packing == "grouped":
            raise ConfigError('packing "grouped" needs the length of every sample, which stream does not know; take "best_fit"')
        if self.stream and self.held_out and not self.held_out_data:
            raise ConfigError("stream holds nothing out by itself; give --held-out-data PATH, or --held-out 0")
        if self.repeat and len(self.repeat) != len(self.data):
            raise ConfigError(f"repeat has {len(self.repeat)} numbers for {len(self.data)} datasets; give one each, or none")
        if any(share < 0 for share in self.repeat):
            raise ConfigError(f"repeat is {list(self.repeat)}, each must be 0 or more")
        if self.held_out >= 1 and self.held_out != int(self.held_out):
            raise ConfigError(f"held_out is {self.held_out}: give a share below 1, such as 0.1, or a whole number of samples")
        if "{name}" not in self.answer:
            raise ConfigError(f'answer is "{self.answer}", must hold {{name}}, where the class name goes')

    def _check_mixture(self) -> None:
        if self.weights and self.repeat:
            raise ConfigError("weights and repeat both say how often each dataset is seen; give one of them")
        if self.weights and len(self.weights) != len(self.data):
            raise ConfigError(f"weights has {len(self.weights)} numbers for {len(self.data)} datasets; give one each, or none")
        if any(weight < 0 for weight in self.weights) or (self.weights and not sum(self.weights)):
            raise ConfigError(f"weights is {list(self.weights)}: each must be 0 or more, and one above 0")
        if self.stream and (self.repeat or self.weights):
            raise ConfigError("stream reads its datasets one behind the other, without repeat or weights; leave them out")

    def _check_columns(self) -> None:
        for column in self.columns:
            ours, equals, theirs = column.partition("=")
            if not equals or not theirs or ours not in COLUMNS:
                near = difflib.get_close_matches(ours, COLUMNS, n=1)
                hint = f"did you mean {near[0]}={theirs or '…'}?" if near else f"known are {', '.join(COLUMNS)}"
                raise ConfigError(f'columns has "{column}", must be OURS=THEIRS, such as image=photo; {hint}')


# What a row of data may hold, and so what columns may be renamed to.
COLUMNS = ("image", "images", "video", "question", "answer", "conversations", "messages", "system", "class")
DATA_RANGES = {
    "video_frames": Bounds(1, 256),
    "preflight_s": Bounds(0),
    "held_out": Bounds(0),
    "max_bad_share": Bounds(0, 1),
    "max_tiles": Bounds(1, 40),
    "limit_megapixels": Bounds(0, above=True),
    "context_tokens": Bounds(16),
}
DATA_FREE_ON_RESUME = ("max_bad_share", "limit_megapixels", "preflight_s")
