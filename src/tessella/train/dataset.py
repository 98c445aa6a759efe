"""A dataset becomes samples, each accounted for: used, or skipped with its reason.

In: a dataset of any format (reading.py).  Out: Samples (messages and pictures, not yet decoded) and a Ledger.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tessella.chat import Message
from tessella.errors import DataError, PromptError
from tessella.geometry import Size
from tessella.image import LIMIT_MEGAPIXELS
from tessella.inputs import Inputs, Lengths, Picture
from tessella.train.classes import Asking
from tessella.train.grounding import check_boxes, from_pixels
from tessella.train.pictures import examine_pictures
from tessella.train.readers import Draft, Found
from tessella.train.reading import Reading, find
from tessella.train.recipe import Recipe
from tessella.train.sample import Sample as Sample  # whoever reads a dataset finds its samples' class here
from tessella.train.split import held_out_groups, is_held_out, repeat, times_of

Split = Literal["train", "held_out", "all"]


@dataclass
class Ledger:
    """Every sample of a dataset, used or skipped with its reason."""

    used: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (place, "kind" or "kind: detail")
    notes: list[str] = field(default_factory=list)
    other_split: int = 0  # good samples of the split that was not asked for

    @property
    def share_bad(self) -> float:
        """Skipped over all; 0 when there is nothing."""
        total = self.used + self.other_split + len(self.skipped)
        return len(self.skipped) / total if total else 0.0

    def reasons(self) -> list[tuple[str, int]]:
        """Kinds of reasons with their counts, the most frequent first."""
        return Counter(reason.partition(":")[0] for _, reason in self.skipped).most_common()

    def report(self) -> str:
        """What was used and why the rest was not, one example of each kind, for people."""
        other = f", {self.other_split:,} of the other split" if self.other_split else ""
        lines = [f"{self.used:,} samples used{other}, {len(self.skipped):,} skipped ({self.share_bad:.1%})"]
        for kind, count in self.reasons():
            place, reason = next(one for one in self.skipped if one[1].partition(":")[0] == kind)
            lines.append(f"  {count:,} x {kind}, as in {place}{reason.removeprefix(kind)}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def check(self, name: str, max_bad_share: float) -> None:
        """Raises DataError when there is nothing, nothing good, or more than max_bad_share bad."""
        good = self.used + self.other_split
        if not good and not self.skipped:
            raise DataError(
                f"{name} is empty: no sample in it; give JSON or JSONL with rows, or a folder of folders with pictures"
            )
        if not good:
            raise DataError(f"{name}: all {len(self.skipped):,} samples are bad; mend the most frequent first.\n{self.report()}")
        if self.share_bad > max_bad_share:
            raise DataError(
                f"{name}: {len(self.skipped):,} of {good + len(self.skipped):,} samples are bad, {self.share_bad:.1%}; "
                f"at most {max_bad_share:.1%}: mend them, or raise max_bad_share.\n{self.report()}"
            )

    def add(self, other: "Ledger") -> None:
        """Take another dataset's ledger in."""
        self.used += other.used
        self.other_split += other.other_split
        self.skipped += other.skipped
        self.notes += other.notes


@dataclass(frozen=True)
class RecipeData:
    """What a recipe's data fields mean: samples to learn from (repeated as asked) and samples held out, each in a fixed order."""

    train: Sequence[Sample]
    held_out: Sequence[Sample]
    ledger: Ledger


def read_dataset(
    path: Path,
    *,
    format: str = "auto",
    image_root: Path | None = None,
    split: Split = "all",
    held_out: float = 0.0,
    seed: int = 0,
    question_language: str = "auto",
    questions: tuple[str, ...] = (),
    answer: str = "{name}",
    choices: str = "hidden",
    max_bad_share: float = 0.05,
    inputs: Inputs | None = None,
    decode: bool = False,
    limit_megapixels: float = LIMIT_MEGAPIXELS,
    reading: Reading | None = None,
) -> tuple[list[Sample], Ledger]:
    """Read one split of a dataset, in the order of the file.

    held_out: a share below 1, or a count of samples; a folder's own val/ comes before it. inputs: measure every sample, and
    refuse what is longer than the context. decode: decode every picture, where otherwise headers and file ends must do. reading:
    in place of the single words on how rows are read.
    Raises DataError: missing, empty, a broken JSON array (line and column), more than max_bad_share bad, nothing held out.
    """
    if split not in ("train", "held_out", "all"):
        raise DataError(f'split is "{split}", must be train, held_out or all')
    if reading is None:
        reading = Reading(format, image_root, Asking(question_language, questions, answer, seed), choices)
    found = find(Path(path), reading)
    held = held_out_groups(found.drafts, held_out, seed)
    samples = _examine(found, inputs, decode, limit_megapixels, reading.boxes)
    picked = [sample for draft, sample in samples if split == "all" or (split == "held_out") == is_held_out(draft, held)]
    ledger = Ledger(len(picked), found.skipped, found.notes, other_split=len(samples) - len(picked))
    ledger.check(str(path), max_bad_share)
    if not picked:
        raise DataError(
            f"{path}: no sample is in the {split} part; {len(samples):,} are in the other: change held_out ({held_out:g})"
        )
    return picked, ledger


def read_recipe_data(recipe: Recipe, inputs: Inputs | None = None, *, decode: bool | None = False) -> RecipeData:
    """All datasets of a recipe. decode: every picture, None where there are few of them.

    Raises DataError as read_dataset does, and when the recipe names no data.
    """
    if not recipe.data:
        raise DataError("the recipe names no data; give --data PATH: JSON, JSONL, or a folder whose folders are classes")
    parts: list[list[Sample]] = []
    held_out: list[Sample] = []
    ledger = Ledger()
    for path in recipe.data:
        good, here = _read_for(recipe, path, 0.0 if recipe.held_out_data else recipe.held_out, inputs, decode)
        parts.append(good["train"])
        if not recipe.held_out_data:
            held_out += good["held_out"]
        elif good["held_out"]:
            here.notes.append(
                f"{path}: its own {len(good['held_out']):,} held-out samples are left alone: held_out_data is given"
            )
            here.used -= len(good["held_out"])
        ledger.add(here)
    for path in recipe.held_out_data:
        good, here = _read_for(recipe, path, 0.0, inputs, decode)
        held_out += good["held_out"] or good["train"]
        here.used = len(good["held_out"] or good["train"])
        ledger.add(here)
    if not any(parts):
        raise DataError(f"nothing to train on: all {len(held_out):,} samples are held out; lower held_out ({recipe.held_out:g})")
    train = _mixed(recipe, parts)
    ledger.notes += _leaks(train, held_out)
    return RecipeData(train, held_out, ledger)


def _mixed(recipe: Recipe, parts: Sequence[Sequence[Sample]]) -> list[Sample]:
    """All datasets, each as often as repeat or weights say."""
    times = list(recipe.repeat) or [1.0] * len(parts)
    if recipe.weights:
        times = times_of(recipe.weights, [sum(sample.repeat for sample in part) for part in parts])
    return [sample for part, often in zip(parts, times, strict=True) for sample in repeat(part, often, recipe.seed)]


def _read_for(
    recipe: Recipe, path: Path, held_out: float, inputs: Inputs | None, decode: bool | None
) -> tuple[dict[str, list[Sample]], Ledger]:
    """Both splits of one dataset of a recipe."""
    found = find(path, Reading.of(recipe))
    held = held_out_groups(found.drafts, held_out, recipe.seed)
    good: dict[str, list[Sample]] = {"train": [], "held_out": []}
    for draft, sample in _examine(found, inputs, decode, recipe.limit_megapixels, recipe.boxes):
        good["held_out" if is_held_out(draft, held) else "train"].append(sample)
    ledger = Ledger(len(good["train"]) + len(good["held_out"]), found.skipped, found.notes)
    ledger.check(str(path), recipe.max_bad_share)
    return good, ledger


# ---- looking at each sample


def _examine(
    found: Found, inputs: Inputs | None, decode: bool | None, limit_megapixels: float, boxes: str
) -> list[tuple[Draft, Sample]]:
    """Drafts whose pictures are sound and whose length fits, with their samples; the others go into found.skipped."""
    sources = [source for draft in found.drafts for source in draft.sources]
    looked_at = examine_pictures(sources, decode=decode, limit_megapixels=limit_megapixels)
    samples = []
    for draft in found.drafts:
        try:
            samples.append((draft, sample_of(draft, [looked_at[source] for source in draft.sources], inputs, boxes)))
        except DataError as error:  # not swallowed: it goes into the ledger, which stops the run when it fills up
            found.skipped.append((draft.place, str(error)))
    return samples


def sample_of(draft: Draft, looked_at: Sequence[Size | str], inputs: Inputs | None, boxes: str) -> Sample:
    """A draft whose pictures were looked at -> Sample. Raises DataError with the reason why it cannot be used."""
    reason = next((size for size in looked_at if isinstance(size, str)), None)
    if reason is not None:
        raise DataError(reason)
    sizes = tuple(size for size in looked_at if not isinstance(size, str))
    messages = from_pixels(draft.messages, sizes) if boxes == "pixels" else draft.messages
    check_boxes(messages)
    measured = Lengths(0, 0, 0) if inputs is None else _measure(messages, sizes, draft.max_tiles, inputs)
    pictures = tuple(Picture(source, draft.max_tiles) for source in draft.sources)
    return Sample(
        draft.place, messages, pictures, draft.key, sizes, draft.label, *measured, draft.repeat, draft.jpeg,
        rejected=draft.rejected,
    )  # fmt: skip


def _measure(messages: Sequence[Message], sizes: Sequence[Size], max_tiles: int | None, inputs: Inputs) -> Lengths:
    """What a sample costs. Raises DataError when it is too long, for nothing is ever cut, or when an answer has no token."""
    try:
        measured = inputs.lengths(messages, sizes, open_turn=False, max_tiles=[max_tiles] * len(sizes))
    except PromptError as error:
        raise DataError(f"prompt: {error}") from error
    if measured.tokens > inputs.context_tokens:
        most = f"at most {inputs.context_tokens:,}: lower max_tiles, or shorten the text"
        raise DataError(f"over-long: {measured.tokens:,} tokens; {most}")
    if measured.learned <= sum(message.role == "assistant" for message in messages):  # their ends alone
        raise DataError("nothing to learn: the answers hold no token")
    return measured


def _leaks(train: Sequence[Sample], held_out: Sequence[Sample]) -> list[str]:
    """A note when pictures that are held out are also trained on: the score would then praise memory."""
    taught = {str(picture.source) for sample in train for picture in sample.pictures}
    both = [sample for sample in held_out if any(str(picture.source) in taught for picture in sample.pictures)]
    if not both:
        return []
    return [f"{len(both):,} held-out samples show pictures that are trained on, as in {both[0].place}: their score is too good"]
