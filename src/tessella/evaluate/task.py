"""Questions with accepted answers: what a model is scored on.

In: held-out samples of a dataset, or a JSON-lines file.  Out: Task, a tuple of Items and the metric that judges them.
How an answer is made is no matter of this file.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tessella.chat import Message, place_marks
from tessella.errors import DataError, PromptError
from tessella.evaluate.metrics import METRICS, Metric, choice_letter
from tessella.image import Held
from tessella.inputs import Picture

ITEM_KEYS = frozenset(("key", "question", "messages", "image", "images", "answer", "answers", "label", "kind"))


@dataclass(frozen=True)
class Item:
    """One question. messages end with the user's turn; any of answers is right; label names the item's class."""

    key: str
    messages: tuple[Message, ...]
    pictures: tuple[Picture, ...]
    answers: tuple[str, ...]
    label: str = ""
    kind: str = ""  # a group of questions, for people

    def __post_init__(self) -> None:
        if not self.messages or self.messages[-1].role != "user":
            raise DataError(f"item {self.key}: the last message must be the user's question")
        if not self.answers or not all(text.strip() for text in self.answers):
            raise DataError(f"item {self.key}: an accepted answer is missing or blank; give at least one")

    @property
    def question(self) -> str:
        """The user's last words, for people."""
        return self.messages[-1].text.replace("<image>", "").strip()


@dataclass(frozen=True)
class Task:
    """Items and the name of their metric (a key of METRICS)."""

    name: str
    items: tuple[Item, ...]
    metric: str = "exact"
    max_tokens: int = 32  # the longest answer; an answer is cut there
    about: str = ""

    def __post_init__(self) -> None:
        if not self.items:
            raise DataError(f"task {self.name} holds no items; give a dataset with a held-out part or a file of questions")
        if self.metric not in METRICS:
            raise DataError(f'metric "{self.metric}" is not known; say one of {", ".join(METRICS)}')
        if self.max_tokens < 1:
            raise DataError(f"task {self.name}: max_tokens is {self.max_tokens}, must be at least 1")
        twice = [key for key, times in Counter(item.key for item in self.items).items() if times > 1]
        if twice:
            raise DataError(f"task {self.name}: {len(twice)} keys stand twice, such as {twice[0]}; a key names one item")
        if self.metric == "choice":
            self._check_letters()

    def _check_letters(self) -> None:
        for item in self.items:
            if not any(choice_letter(text) for text in item.answers):
                raise DataError(f'item {item.key}: answer "{item.answers[0]}" names no letter A to D; take another metric')

    @property
    def judge(self) -> Metric:
        return METRICS[self.metric]

    def digest(self) -> str:
        """A name for what is asked (not for what is right): the same questions, pictures and answer length."""
        asked = hashlib.sha256(f"{self.name}\0{self.max_tokens}".encode())
        for item in self.items:
            words = [item.key, *(part for message in item.messages for part in (message.role, message.text))]
            words += [_picture_words(picture) for picture in item.pictures]
            asked.update(json.dumps(words, ensure_ascii=False).encode())
        return asked.hexdigest()[:16]


def _picture_words(picture: Picture) -> str:
    source = picture.source
    if isinstance(source, bytes):
        name = hashlib.sha256(source).hexdigest()
    elif isinstance(source, str | Path | Held):
        name = str(source)
    else:
        name = hashlib.sha256(source.tobytes()).hexdigest()
    return f"{name} {picture.max_tiles}"


class SampleLike(Protocol):
    """What a dataset's sample shows: a conversation that ends with the assistant's answer; label is its class or ""."""

    @property
    def key(self) -> str: ...
    @property
    def place(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def messages(self) -> Sequence[Message]: ...
    @property
    def pictures(self) -> Sequence[Picture]: ...


def items_from(samples: Iterable[SampleLike], *, kind: str = "") -> tuple[Item, ...]:
    """Held-out samples -> items: the last assistant message is the answer, everything before it the question.

    Pictures that belong to turns after the question do not exist, so all pictures stay. A key that comes again gets
    "#2", "#3", .... Raises DataError naming the sample's place.
    """
    seen: Counter[str] = Counter()
    items = []
    for sample in samples:
        messages = tuple(sample.messages)
        if len(messages) < 2 or messages[-1].role != "assistant":
            raise DataError(f"{sample.place}: a held-out sample must end with the assistant's answer")
        seen[sample.key] += 1
        key = sample.key if seen[sample.key] == 1 else f"{sample.key}#{seen[sample.key]}"
        answer = messages[-1].text.strip()
        items.append(Item(key, messages[:-1], tuple(sample.pictures), (answer,), sample.label or answer, kind))
    return tuple(items)


def read_items(path: str | Path) -> tuple[Item, ...]:
    """A JSON-lines file of questions -> items.

    A line holds "question" (or "messages" with role and content), "image" or "images" (paths beside the file), "answer"
    or "answers", and if wanted "key", "label", "kind". Raises DataError with file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} is not a file; give JSON lines, one question a line")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would also cut at U+2028 inside a text
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    return tuple(_read_item(line, path, number) for number, line in enumerate(lines, 1) if line.strip())


def _read_item(line: str, path: Path, number: int) -> Item:
    place = f"{path.name}:{number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON ({error}); one object a line") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: holds a {type(row).__name__}, must be an object")
    unknown = sorted(set(row) - ITEM_KEYS)
    if unknown:
        raise DataError(f"{place}: {unknown[0]} is not known; a line may hold {', '.join(sorted(ITEM_KEYS))}")
    pictures = tuple(_read_picture(name, path.parent, place) for name in _texts(row, "image", "images", place))
    answers = _texts(row, "answer", "answers", place)
    if not answers:
        raise DataError(f"{place}: no answer; give answer or answers")
    label = str(row.get("label") or answers[0])
    key = str(row.get("key") or place)
    return Item(key, _read_messages(row, len(pictures), place), pictures, answers, label, str(row.get("kind") or ""))


def _texts(row: dict[str, Any], one: str, many: str, place: str) -> tuple[str, ...]:
    """row[one] or row[many] as texts; () when neither stands there."""
    if row.get(one) is not None and row.get(many) is not None:
        raise DataError(f"{place}: holds both {one} and {many}; give one of them")
    found = row[one] if row.get(one) is not None else row.get(many)
    if found is None:
        return ()
    listed = found if isinstance(found, list) else [found]
    if not all(isinstance(text, str) for text in listed):
        raise DataError(f"{place}: {one} or {many} is {found!r}, must be a text or a list of texts")
    return tuple(listed)


def _read_picture(name: str, folder: Path, place: str) -> Picture:
    path = folder / name
    if not path.is_file():
        raise DataError(f"{place}: picture {path} is missing; paths count from the file's folder")
    return Picture(path)


def _read_messages(row: dict[str, Any], pictures: int, place: str) -> tuple[Message, ...]:
    if ("question" in row) == ("messages" in row):
        raise DataError(f"{place}: give question or messages, one of them")
    if "question" in row:
        if not isinstance(row["question"], str):
            raise DataError(f"{place}: question is {row['question']!r}, must be a text")
        try:
            return (Message("user", place_marks(row["question"], pictures)),)
        except PromptError as error:
            raise DataError(f"{place}: {error}") from error
    if not isinstance(row["messages"], list):
        raise DataError(f"{place}: messages must be a list")
    return tuple(_read_message(message, place) for message in row["messages"])


def _read_message(message: Any, place: str) -> Message:
    role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f"{place}: each of messages needs role and content, both texts")
    return Message(role, content)
