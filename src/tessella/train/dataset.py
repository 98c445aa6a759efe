"""A dataset becomes samples, each accounted for: used, or skipped with its reason.

In: a JSON or JSONL file, or a folder of folders.  Out: Samples (messages and pictures, not yet decoded) and a Ledger.
"""

import hashlib
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from tessella.chat import Message
from tessella.errors import DataError, PromptError
from tessella.geometry import Size
from tessella.image import LIMIT_MEGAPIXELS
from tessella.inputs import Inputs, Picture
from tessella.train.classes import Asking, read_folder
from tessella.train.foodieqa import drafts_of_sivqa, is_sivqa
from tessella.train.pictures import examine_pictures
from tessella.train.readers import Draft, Found, draft_row, read_rows
from tessella.train.recipe import Recipe

Split = Literal["train", "held_out", "all"]
FORMATS = ("auto", "llava", "openai", "folder", "foodieqa")
HALF_CHARACTER = re.compile("[\ud800-\udfff]")
ARCHIVES = (".tar", ".gz", ".tgz", ".zip", ".7z", ".parquet", ".arrow")


@dataclass(frozen=True)
class Sample:
    """One conversation to learn from."""

    place: str  # "file.jsonl:12", or the picture's path in a folder of folders
    messages: tuple[Message, ...]
    pictures: tuple[Picture, ...]
    key: str  # stable: a hash of what the sample says and shows
    sizes: tuple[Size, ...] = ()  # of the pictures, from their headers
    label: str = ""  # class or dish, where the format has one
    tokens: int = 0  # prompt, pictures and answers; 0 when not measured

    @property
    def question(self) -> str:
        """What the user asks first."""
        return next(message.text for message in self.messages if message.role == "user")

    @property
    def answer(self) -> str:
        """What the assistant says last."""
        return self.messages[-1].text


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
    question_language: str = "auto",
    questions: tuple[str, ...] = (),
    answer: str = "{name}",
    choices: str = "hidden",
    max_bad_share: float = 0.05,
    inputs: Inputs | None = None,
    decode: bool = False,
    limit_megapixels: float = LIMIT_MEGAPIXELS,
) -> tuple[list[Sample], Ledger]:
    """Read one split of a dataset, in the order of the file.

    held_out: a share below 1, or a count of samples; a folder's own val/ comes before it. inputs: measure every sample, and
    refuse what is longer than the context. decode: decode every picture, where otherwise headers and file ends must do.
    Raises DataError: missing, empty, a broken JSON array (line and column), more than max_bad_share bad, nothing held out.
    """
    if split not in ("train", "held_out", "all"):
        raise DataError(f'split is "{split}", must be train, held_out or all')
    asking = Asking(question_language, questions, answer, seed)
    found = _find(Path(path), format, image_root, asking, choices)
    held = _held_out_groups(found.drafts, held_out, seed)
    samples = _examine(found, inputs, decode, limit_megapixels)
    picked = [sample for draft, sample in samples if split == "all" or (split == "held_out") == _is_held_out(draft, held)]
    ledger = Ledger(len(picked), found.skipped, found.notes, other_split=len(samples) - len(picked))
    ledger.check(str(path), max_bad_share)
    if not picked:
        raise DataError(
            f"{path}: no sample is in the {split} part; {len(samples):,} are in the other: change held_out ({held_out:g})"
        )
    return picked, ledger


def read_recipe_data(recipe: Recipe, inputs: Inputs | None = None) -> RecipeData:
    """All datasets of a recipe. Raises DataError as read_dataset does, and when the recipe names no data."""
    if not recipe.data:
        raise DataError("the recipe names no data; give --data PATH: JSON, JSONL, or a folder whose folders are classes")
    train: list[Sample] = []
    held_out: list[Sample] = []
    ledger = Ledger()
    for index, path in enumerate(recipe.data):
        good, here = _read_for(recipe, path, 0.0 if recipe.held_out_data else recipe.held_out, inputs)
        train += repeat(good["train"], recipe.repeat[index] if recipe.repeat else 1.0, recipe.seed)
        if not recipe.held_out_data:
            held_out += good["held_out"]
        elif good["held_out"]:
            here.notes.append(
                f"{path}: its own {len(good['held_out']):,} held-out samples are left alone: held_out_data is given"
            )
            here.used -= len(good["held_out"])
        ledger.add(here)
    for path in recipe.held_out_data:
        good, here = _read_for(recipe, path, 0.0, inputs)
        held_out += good["held_out"] or good["train"]
        here.used = len(good["held_out"] or good["train"])
        ledger.add(here)
    if not train:
        raise DataError(f"nothing to train on: all {len(held_out):,} samples are held out; lower held_out ({recipe.held_out:g})")
    ledger.notes += _leaks(train, held_out)
    return RecipeData(train, held_out, ledger)


def _read_for(recipe: Recipe, path: Path, held_out: float, inputs: Inputs | None) -> tuple[dict[str, list[Sample]], Ledger]:
    """Both splits of one dataset of a recipe."""
    asking = Asking(recipe.question_language, recipe.questions, recipe.answer, recipe.seed)
    found = _find(path, recipe.format, recipe.image_root, asking, recipe.choices)
    held = _held_out_groups(found.drafts, held_out, recipe.seed)
    good: dict[str, list[Sample]] = {"train": [], "held_out": []}
    for draft, sample in _examine(found, inputs, False, recipe.limit_megapixels):
        good["held_out" if _is_held_out(draft, held) else "train"].append(sample)
    ledger = Ledger(len(good["train"]) + len(good["held_out"]), found.skipped, found.notes)
    ledger.check(str(path), recipe.max_bad_share)
    return good, ledger


# ---- reading


def _find(path: Path, format: str, image_root: Path | None, asking: Asking, choices: str) -> Found:
    """Drafts of a file or folder, whatever its format."""
    if format not in FORMATS:
        raise DataError(f'format is "{format}", must be one of {", ".join(FORMATS)}')
    if not os.path.exists(path):
        raise DataError(f"{path}: no such file or folder; check the path")
    if path.suffix.lower() in ARCHIVES and path.is_file():
        raise DataError(f"{path} is packed; unpack it and give the folder, or the JSON file in it")
    if path.is_dir():
        if format not in ("auto", "folder"):
            raise DataError(f'{path} is a folder, but format is "{format}"; give the file in it, or format "folder"')
        return read_folder(path, asking)
    if format == "folder":
        raise DataError(f'{path} is a file, but format is "folder"; give a folder of folders, or format "auto"')
    found = Found()
    root = path.parent if image_root is None else Path(image_root)
    for place, row in read_rows(path):
        try:
            found.drafts += _sound(_drafts_of(place, row, format, root, asking.language, choices))
        except (DataError, PromptError) as error:  # not swallowed: it goes into the ledger, which stops the run when it fills up
            found.skipped.append((place, str(error)))
    return found


def _drafts_of(place: str, row: object, format: str, root: Path, language: str, choices: str) -> list[Draft]:
    """One row of a file -> drafts. Raises DataError with the reason, also one that reading the line met."""
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, Mapping):
        raise DataError(f"no row: it is a {type(row).__name__}, must be an object")
    if format == "foodieqa" or (format == "auto" and is_sivqa(row)):
        return drafts_of_sivqa(place, row, root, language=language, choices=choices)
    wanted = {"llava": ("conversations",), "openai": ("messages",), "auto": ("conversations", "messages")}
    if not any(key in row for key in wanted[format]):
        raise DataError(
            f"no conversation: the row has {', '.join(list(row)[:6]) or 'no key'}, must have {' or '.join(wanted[format])}"
        )
    if format == "openai" and "conversations" in row:
        row = {key: value for key, value in row.items() if key != "conversations"}
    return [draft_row(place, row, root)]


def _sound(drafts: list[Draft]) -> list[Draft]:
    """The same drafts. Raises DataError for half characters, which JSON can write (\\ud800) and no tokenizer can read."""
    for draft in drafts:
        for text in (*(message.text for message in draft.messages), *draft.names, draft.label):
            if HALF_CHARACTER.search(text):
                raise DataError("broken text: half a surrogate pair in it; write the character in UTF-8")
    return drafts


def _examine(found: Found, inputs: Inputs | None, decode: bool, limit_megapixels: float) -> list[tuple[Draft, Sample]]:
    """Drafts whose pictures are sound and whose length fits, with their samples; the others go into found.skipped."""
    sources = [source for draft in found.drafts for source in draft.sources]
    looked_at = examine_pictures(sources, decode=decode, limit_megapixels=limit_megapixels)
    samples = []
    for draft in found.drafts:
        sizes = [looked_at[source] for source in draft.sources]
        reason = next((size for size in sizes if isinstance(size, str)), None)
        tokens = 0
        sound = tuple(size for size in sizes if not isinstance(size, str))
        if reason is None and inputs is not None:
            tokens, reason = _measure(draft.messages, sound, inputs)
        if reason is not None:
            found.skipped.append((draft.place, reason))
            continue
        pictures = tuple(Picture(source) for source in draft.sources)
        samples.append((draft, Sample(draft.place, draft.messages, pictures, draft.key, sound, draft.label, tokens)))
    return samples


def _measure(messages: Sequence[Message], sizes: Sequence[Size], inputs: Inputs) -> tuple[int, str | None]:
    """(tokens, None), or (tokens, why the sample cannot be used). Nothing is ever cut to fit."""
    try:
        tokens = inputs.measure(messages, sizes, open_turn=False)
    except PromptError as error:
        return 0, f"prompt: {error}"
    if tokens <= inputs.context_tokens:
        return tokens, None
    return tokens, f"over-long: {tokens:,} tokens; at most {inputs.context_tokens:,}: lower max_tiles, or shorten the text"


# ---- splitting


def _is_held_out(draft: Draft, held: frozenset[str]) -> bool:
    return draft.part == "held_out" or (draft.part == "" and draft.group in held)


def _held_out_groups(drafts: Sequence[Draft], held_out: float, seed: int) -> frozenset[str]:
    """Groups of drafts to hold out: the seed's choice, whole groups, even over the strata, whatever the order of the rows.

    None when held_out is 0, or when the data itself says what is held out. At least one group stays to learn from.
    """
    if held_out == 0 or any(draft.part for draft in drafts):
        return frozenset()
    wanted = max(1, round(held_out * len(drafts))) if held_out < 1 else int(held_out)
    if held_out >= 1 and drafts and wanted >= len(drafts):
        raise DataError(
            f"held_out is {wanted:,}, but there are only {len(drafts):,} samples; hold out fewer, or a share such as 0.1"
        )
    sizes = Counter(draft.group for draft in drafts)
    order = _in_seeded_order({draft.group: draft.stratum for draft in drafts}, seed)
    taken: list[str] = []
    count = 0
    for group in order[: max(0, len(order) - 1)]:
        if count >= wanted:
            break
        taken.append(group)
        count += sizes[group]
    return frozenset(taken)


def _in_seeded_order(stratum_of: Mapping[str, str], seed: int) -> list[str]:
    """Groups so ordered that each beginning of the list holds about the same share of every stratum."""
    by_stratum: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for group, stratum in stratum_of.items():
        digest = hashlib.sha256(f"{seed}/{group}".encode("utf-8", "surrogatepass")).hexdigest()
        by_stratum[stratum].append((digest, group))
    placed = []
    for members in by_stratum.values():
        for rank, (digest, group) in enumerate(sorted(members)):
            placed.append(((rank + 0.5) / len(members), digest, group))
    return [group for _, _, group in sorted(placed)]


def repeat(samples: Sequence[Sample], times: float, seed: int) -> list[Sample]:
    """2.5 gives each sample twice and a seeded half of them once more; copies have keys of their own, to be augmented apart."""
    share, whole = math.modf(times)
    order = _in_seeded_order({sample.key: "" for sample in samples}, seed)
    more = set(order[: round(share * len(order))])
    rounds = [list(samples)] * int(whole) + [[sample for sample in samples if sample.key in more]]
    return [replace(sample, key=f"{sample.key}#{n}" if n else sample.key) for n, some in enumerate(rounds) for sample in some]


def _leaks(train: Sequence[Sample], held_out: Sequence[Sample]) -> list[str]:
    """A note when pictures that are held out are also trained on: the score would then praise memory."""
    taught = {str(picture.source) for sample in train for picture in sample.pictures}
    both = [sample for sample in held_out if any(str(picture.source) in taught for picture in sample.pictures)]
    if not both:
        return []
    return [f"{len(both):,} held-out samples show pictures that are trained on, as in {both[0].place}: their score is too good"]
