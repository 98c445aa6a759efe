"""A folder of folders becomes drafts: the folder that holds a picture is its class, classes become questions and answers.

In: FOLDER/…/CLASS/picture.jpg, or the same below train/ and val/.  Out: one draft a picture.
"""

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tessella.chat import Message, place_marks
from tessella.errors import DataError
from tessella.train.readers import Draft, Found

SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2"))
TRAIN_FOLDERS = ("train", "training")
HELD_OUT_FOLDERS = ("val", "valid", "validation", "held_out", "held-out", "test")  # the first one found is held out

QUESTIONS = {
    "en": (
        "What is in this picture?",
        "What is this?",
        "What does the picture show?",
        "Name what you see here.",
        "Can you tell me what this is?",
    ),
    "zh": ("图中是什么？", "这是什么？", "图片里是什么东西？", "请说出图中的东西。", "你能告诉我这是什么吗？"),
}


@dataclass(frozen=True)
class Asking:
    """How a class name becomes a question and an answer."""

    language: str = "auto"  # "auto" takes the language of the name; "both" asks in either
    questions: tuple[str, ...] = ()  # in place of QUESTIONS
    answer: str = "{name}"
    seed: int = 0

    def ask(self, name: str, picture: str, *, held_out: bool) -> str:
        """The question about one picture; the seed picks the phrasing, and what is held out is always asked the first one."""
        digest = hashlib.sha256(f"{self.seed}/{picture}".encode("utf-8", "surrogatepass")).digest()
        if self.questions:
            phrasings: Sequence[str] = self.questions
        elif self.language == "auto":
            phrasings = QUESTIONS["zh" if has_chinese(name) else "en"]
        elif self.language == "both":
            phrasings = QUESTIONS["zh" if digest[0] % 2 else "en"]
        else:
            phrasings = QUESTIONS[self.language]
        return phrasings[0 if held_out else int.from_bytes(digest[1:5], "little") % len(phrasings)]


def has_chinese(text: str) -> bool:
    """True when text holds a Han character."""
    return re.search(r"[\u3400-\u9fff]", text) is not None


def class_name(folder: str) -> str:
    """Underscores and dashes become spaces: "Golden-Delicious" -> "Golden Delicious"."""
    return " ".join(re.sub(r"[_\-]+", " ", folder).split())


def read_folder(folder: Path, asking: Asking) -> Found:
    """Every picture below folder -> a Draft, or a reason why not. Other files and hidden folders are noted."""
    found = Found()
    parts = _parts(folder, found)
    pictures = [(path, part) for root, part in parts for path in _pictures(folder, root, found)]
    names = _names(folder, [path for path, part in pictures], [root for root, _ in parts])
    for path, part in pictures:
        place, name = path.relative_to(folder).as_posix(), names.get(path.parent, "")
        if not name:
            found.skipped.append((place, "in no class folder: put it into a folder named after its class"))
            continue
        # The question must not change when a file moves between train/ and val/, so the part's name stays out of the choice.
        question = asking.ask(name, f"{name}/{path.name}", held_out=part == "held_out")
        messages = (
            Message("user", place_marks(question, 1)),
            Message("assistant", asking.answer.replace("{name}", name)),
        )
        found.drafts.append(Draft(place, messages, (path,), (place,), group=place, stratum=name, label=name, part=part))
    classes = {draft.label for draft in found.drafts}
    if len(classes) == 1:
        found.notes.append(f'only one class, "{classes.pop()}": a model taught one answer gives it always')
    return found


def _parts(folder: Path, found: Found) -> list[tuple[Path, str]]:
    """[(folder to walk, "train" | "held_out" | "")]: train/ and val/ count as parts when nothing but parts stands beside them."""
    try:
        below = sorted(path for path in folder.iterdir() if path.is_dir() and not _hidden(path.name))
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}); check path and permissions") from error
    named = {path.name.lower(): path for path in below}
    train = [named[name] for name in TRAIN_FOLDERS if name in named]
    held = [named[name] for name in HELD_OUT_FOLDERS if name in named]
    if not train or set(below) - set(train) - set(held):
        return [(folder, "")]
    strays = sum(path.is_file() and path.suffix.lower() in SUFFIXES for path in folder.iterdir())
    if strays:
        found.notes.append(f"{strays:,} pictures beside {train[0].name}/ are left alone: move them into a class folder below it")
    for left in held[1:]:
        found.notes.append(f"{left.name}/ is left alone: {held[0].name}/ is what is held out")
    if not held:
        return [(path, "") for path in train]  # to be split like any other folder
    return [(path, "train") for path in train] + [(held[0], "held_out")]


def _hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


def _pictures(folder: Path, root: Path, found: Found) -> list[Path]:
    """Picture files below root in a fixed order; the rest is noted."""
    pictures: list[Path] = []
    others: Counter[str] = Counter()
    for here, below, files in os.walk(root, followlinks=True):
        loops = [name for name in below if Path(here).resolve().is_relative_to(Path(here, name).resolve())]
        found.notes += [f"{os.path.join(here, name)} links to a folder that holds it, so it is left alone" for name in loops]
        below[:] = sorted(name for name in below if name not in loops and not _hidden(name))
        for name in sorted(files):
            path = Path(here, name)
            if path.suffix.lower() in SUFFIXES and not _hidden(name):
                pictures.append(path)
            else:
                others[path.suffix.lower() or name] += 1
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5))
        found.notes.append(f"{root.relative_to(folder).as_posix()}/: {sum(others.values())} files that are no pictures ({kinds})")
    return pictures


def _names(folder: Path, pictures: Sequence[Path], roots: Sequence[Path]) -> dict[Path, str]:
    """Folder -> class name. Two folders of one name ("Apple/Green", "Pepper/Green") take their parent's name before theirs."""
    tops = {folder, *roots}
    holders = sorted({path.parent for path in pictures} - tops)
    tails: dict[str, set[str]] = defaultdict(set)
    for holder in holders:
        tails[class_name(holder.name)].add(_below(holder, roots))
    names = {}
    for holder in holders:
        name = class_name(holder.name)
        torn = len(tails[name]) > 1 and holder.parent not in tops
        names[holder] = f"{class_name(holder.parent.name)} {name}" if torn else name
    return names


def _below(path: Path, roots: Sequence[Path]) -> str:
    """The path below train/ or val/, so that train/Apple/Green and val/Apple/Green are one class."""
    root = next(root for root in roots if path.is_relative_to(root))
    return path.relative_to(root).as_posix()
