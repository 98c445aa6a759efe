"""Rows of JSON and JSONL become drafts: conversations whose pictures are named, not yet looked at.

In: a file of LLaVA rows (image, conversations) or OpenAI rows (messages).  Out: drafts, and each bad row with its reason.
A reason is "kind" or "kind: detail", so that reasons can be counted by kind.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tessella.chat import IMAGE_MARK, Message, place_marks
from tessella.errors import DataError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Draft:
    """A sample whose pictures nobody has looked at yet."""

    place: str  # "file.jsonl:12", or the picture's path inside a folder of folders
    messages: tuple[Message, ...]
    sources: tuple[str | Path, ...]  # paths, or data: URIs
    names: tuple[str, ...]  # the pictures as the dataset names them, the same wherever it lies
    group: str  # what must not be torn apart by a split: a dish, or the pictures
    stratum: str = ""  # what a split is even over: a class
    label: str = ""
    part: str = ""  # "train" or "held_out" where the data itself says so

    @property
    def key(self) -> str:
        """Hash of what is said and shown; the same wherever the dataset lies."""
        said = [[message.role, message.text] for message in self.messages]
        return hashlib.sha256(json.dumps([said, self.names]).encode()).hexdigest()[:16]


@dataclass
class Found:
    """What reading a dataset brought up."""

    drafts: list[Draft] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (place, reason)
    notes: list[str] = field(default_factory=list)


# ---- files


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, row) of a JSON array or of JSON lines; a broken line comes as (place, DataError).

    Raises DataError when the file cannot be read, or is one array and broken: nothing after the break can be trusted.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check path and permissions") from error
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    return _array_rows(path, raw) if raw.lstrip()[:1] == b"[" else _line_rows(path, raw)


def _line_rows(path: Path, raw: bytes) -> Iterator[tuple[str, Any]]:
    lines = raw.split(b"\n")
    first = next((line for line in lines if line.strip()), b"")
    if first.strip() == b"{":
        raise DataError(f"{path} is one object over many lines; must be an array of rows, or JSONL with one row a line")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path.name}:{number}"
        try:
            yield place, json.loads(line.decode("utf-8"))
        except json.JSONDecodeError as error:
            yield place, DataError(f"broken JSON: line {number}, column {error.colno}: {error.msg}")
        except UnicodeDecodeError as error:
            yield place, DataError(f"broken JSON: line {number}, byte {error.start + 1} is no UTF-8")
        except (RecursionError, ValueError) as error:  # ValueError: an integer of thousands of digits
            yield place, DataError(f"broken JSON: line {number}: {error}")


def _array_rows(path: Path, raw: bytes) -> Iterator[tuple[str, Any]]:
    way_out = "mend it there, or write JSONL, where a broken line costs one sample and not the file"
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: broken JSON on line {line}: byte {error.start + 1} is no UTF-8; {way_out}") from error
    try:
        yield from _array_items(path.name, text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: broken JSON on line {error.lineno}, column {error.colno}: {error.msg}; {way_out}") from error
    except (RecursionError, ValueError) as error:  # ValueError: an integer of thousands of digits
        raise DataError(f"{path}: broken JSON: {error}; {way_out}") from error


def _array_items(name: str, text: str) -> Iterator[tuple[str, Any]]:
    """Each item with the line that it begins on; json.loads would forget the lines."""
    scan = json.JSONDecoder().raw_decode
    at = _next(text, _next(text, 0) + 1)
    line, counted = 1, 0
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        item, at = scan(text, at)
        yield f"{name}:{line}", item
        at = _next(text, at)
        if text[at : at + 1] == ",":
            at = _next(text, at + 1)
            if text[at : at + 1] == "]":
                raise json.JSONDecodeError("a comma before the closing bracket", text, at)
        elif text[at : at + 1] != "]":
            raise json.JSONDecodeError("expecting ',' or ']'", text, at)
    rest = _next(text, at + 1)
    if rest < len(text):
        raise json.JSONDecodeError("extra data after the array", text, rest)


def _next(text: str, at: int) -> int:
    """Index of the next character that is no white space."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


# ---- rows


def draft_row(place: str, row: Mapping[str, Any], image_root: Path) -> Draft:
    """A LLaVA or OpenAI row -> Draft. Raises DataError with the reason."""
    if "video" in row:
        raise DataError("video: rows with a video cannot be learned from")
    named = _named_pictures(row)
    if "conversations" in row:
        turns = _llava_turns(row["conversations"])
    else:
        turns, inline = _openai_turns(row["messages"])
        if named and inline:
            raise DataError("pictures named twice: both in the messages and in the row")
        named = named or inline
    messages = conversation(turns, len(named))
    sources = tuple(locate(name, image_root) for name in named)
    return Draft(place, messages, sources, tuple(named), group="\n".join(sorted(named)) or json.dumps(turns))


def locate(name: str, image_root: Path) -> str | Path:
    """A picture as a row names it -> where it lies. Raises DataError for the web."""
    if name[:5].lower() == "data:":
        return name
    if name.lower().startswith(("http://", "https://", "s3://")):
        raise DataError(f"picture on the web: {name[:120]}; download it and give its path")
    return image_root / (unquote(name.removeprefix("file://")) if name.startswith("file://") else name)


def _named_pictures(row: Mapping[str, Any]) -> list[str]:
    names = row.get("images") or row.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"image is no path: {str(names)[:80]}; must be text or a list of texts")
    return names


def _llava_turns(raw: Any) -> list[tuple[str, str]]:
    if not isinstance(raw, list) or not raw:
        raise DataError("no conversation: conversations must be a list of turns")
    turns = []
    for turn in raw:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
            raise DataError(f"broken turn: {str(turn)[:80]}; must be {{from, value}} with text as value")
        turns.append((_role(turn.get("from")), turn["value"]))
    return turns


def _openai_turns(raw: Any) -> tuple[list[tuple[str, str]], list[str]]:
    if not isinstance(raw, list) or not raw:
        raise DataError("no conversation: messages must be a list of messages")
    turns: list[tuple[str, str]] = []
    pictures: list[str] = []
    for message in raw:
        if not isinstance(message, Mapping):
            raise DataError(f"broken turn: {str(message)[:80]}; must be {{role, content}}")
        role, content = _role(message.get("role")), message.get("content")
        if isinstance(content, str):
            turns.append((role, content))
        elif isinstance(content, list):
            text, shown = _parts(content, first_number=len(pictures) + 1)
            if shown and role != "user":
                raise DataError(f"picture in a turn of the {role}: only the user shows pictures")
            turns.append((role, text))
            pictures += shown
        else:
            raise DataError(f"broken turn: content of the {role} is {str(content)[:40]}, must be text or a list of parts")
    return turns, pictures


def _parts(parts: Sequence[Any], first_number: int) -> tuple[str, list[str]]:
    """Parts of one message -> (text with marks, pictures). Pictures all before or all after the text go before it, as in chat."""
    pieces: list[str] = []
    pictures: list[str] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        elif kind == "image_url":
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, Mapping) else url
            if not isinstance(url, str) or not url:
                raise DataError(f"image_url without a url: {str(part)[:80]}")
            pieces.append(IMAGE_MARK)
            pictures.append(url)
        else:
            raise DataError(f"unknown part: {str(part)[:80]}; known are text and image_url")
    texts = [piece for piece in pieces if piece != IMAGE_MARK]
    text, number = "\n".join(texts), len(pictures)
    if IMAGE_MARK in text:
        raise DataError(f"{IMAGE_MARK} typed: in a part of type text; show the picture in a part of type image_url")
    apart = pieces[:number].count(IMAGE_MARK) == number or pieces[len(pieces) - number :].count(IMAGE_MARK) == number
    return (place_marks(text, number, first_number) if apart else "\n".join(pieces)), pictures


def _role(name: Any) -> str:
    if not isinstance(name, str) or name not in ROLES:
        raise DataError(f"unknown role: {str(name)[:40]}; known are {', '.join(ROLES)}")
    return ROLES[name]


# ---- what every conversation must keep


def conversation(turns: Sequence[tuple[str, str]], pictures: int) -> tuple[Message, ...]:
    """(role, text) of a conversation with this many pictures -> messages with one mark a picture.

    Without marks the pictures go before the first question. A lone mark behind the first question moves before it: chat asks so,
    and a model must be asked as it was taught. Other marks stay where they stand. Raises DataError with the reason.
    """
    _check_turns(turns)
    first = next(index for index, (role, _) in enumerate(turns) if role == "user")
    marks = sum(text.count(IMAGE_MARK) for _, text in turns)
    if marks and not pictures:
        raise DataError(f"row without image: no picture, but {marks} {IMAGE_MARK} in the text")
    if marks not in (0, pictures):
        raise DataError(f"pictures and marks differ: {pictures} pictures, but {marks} {IMAGE_MARK} in the text")
    texts = [text for _, text in turns]
    question = texts[first].strip()
    if not marks and pictures:
        texts[first] = place_marks(question, pictures)
    elif pictures == 1 and question.endswith(IMAGE_MARK) and question != IMAGE_MARK:
        texts[first] = place_marks(question.removesuffix(IMAGE_MARK).rstrip(), 1)
    return tuple(Message(role, text.strip()) for (role, _), text in zip(turns, texts, strict=True))


def _check_turns(turns: Sequence[tuple[str, str]]) -> None:
    spoken = [role for role, _ in turns]
    if "system" in spoken[1:]:
        raise DataError("system message not first: there may be one, before all others")
    talk = spoken[1:] if spoken[0] == "system" else spoken
    if not talk or talk[0] != "user":
        raise DataError("no question first: a conversation begins with the user")
    for before, after in pairwise(talk):
        if before == after:
            raise DataError(f"two turns of the {before} in a row: join them")
    if talk[-1] != "assistant":
        raise DataError("nothing to learn: the last turn is the user's")
    for role, text in turns:
        if not text.strip():
            raise DataError("empty answer" if role == "assistant" else f"empty turn of the {role}")
        if role != "user" and IMAGE_MARK in text:
            raise DataError(f"picture in a turn of the {role}: only the user shows pictures")
        if "<video>" in text:
            raise DataError("video: rows with a video cannot be learned from")
