"""Rows become drafts: conversations whose pictures are named, not yet looked at.

In: a file of LLaVA or ShareGPT rows (image, conversations), OpenAI rows (messages), or rows of question and answer.
Out: drafts, and each bad row with its reason.
A reason is "kind" or "kind: detail", so that reasons can be counted by kind.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tessella.chat import IMAGE_MARK, Message, place_marks
from tessella.errors import DataError
from tessella.image import Held
from tessella.train.held import TableCell, frames_of

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
HALF_CHARACTER = re.compile("[\ud800-\udfff]")
VIDEO_MARK = "<video>"
VIDEO_FRAMES = 8


@dataclass(frozen=True)
class Draft:
    """A sample whose pictures nobody has looked at yet."""

    place: str  # "file.jsonl:12", or the picture's path inside a folder of folders
    messages: tuple[Message, ...]
    sources: tuple[str | Path | Held, ...]  # paths, data: URIs, or what lies in something else
    names: tuple[str, ...]  # the pictures as the dataset names them, the same wherever it lies
    group: str  # what must not be torn apart by a split: a dish, or the pictures
    stratum: str = ""  # what a split is even over: a class
    label: str = ""
    part: str = ""  # "train" or "held_out" where the data itself says so
    max_tiles: int | None = None  # of each picture, where the data itself says so
    repeat: float = 1.0  # how often it is seen in an epoch
    jpeg: bool = False  # its pictures are compressed anew at each look
    rejected: str = ""  # of a pair: the answer that is liked less

    @property
    def key(self) -> str:
        """Hash of what is said and shown; the same wherever the dataset lies."""
        said = [[message.role, message.text] for message in self.messages]
        said += [["rejected", self.rejected]] if self.rejected else []
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
        yield f"{path.name}:{number}", row_of_line(line, number)


def row_of_line(line: bytes, number: int) -> Any:
    """The row on a line, or a DataError in its place."""
    try:
        return json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        return DataError(f"broken JSON: line {number}, column {error.colno}: {error.msg}")
    except UnicodeDecodeError as error:
        return DataError(f"broken JSON: line {number}, byte {error.start + 1} is no UTF-8")
    except (RecursionError, ValueError) as error:  # ValueError: an integer of thousands of digits
        return DataError(f"broken JSON: line {number}: {error}")


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


def draft_row(place: str, row: Mapping[str, Any], image_root: Path, *, video_frames: int = VIDEO_FRAMES) -> Draft:
    """A row of conversations, messages, or question and answer -> Draft. Raises DataError with the reason."""
    named = _named_pictures(row)
    if "conversations" in row:
        turns = _llava_turns(row["conversations"])
    elif "messages" in row:
        turns, inline = _openai_turns(row["messages"])
        if named and inline:
            raise DataError("pictures named twice: both in the messages and in the row")
        named = named or [*inline]
    else:
        turns = _asked_and_answered(row)
    turns = _with_system(row, turns)
    if row.get("video"):
        if named:
            raise DataError("video and pictures: a row shows one or the other")
        return _video_draft(place, row["video"], turns, image_root, video_frames)
    messages = conversation(turns, len(named))
    sources = tuple(locate(name, image_root) for name in named)
    names = tuple(name.digest if isinstance(name, TableCell) else str(name) for name in named)
    return Draft(place, messages, sources, names, group="\n".join(sorted(names)) or json.dumps(turns))


def _video_draft(place: str, named: Any, turns: list[tuple[str, str]], image_root: Path, video_frames: int) -> Draft:
    """A video is shown as its frames, one tile each, where <video> stands or before the first question.

    Source: internvl/train/dataset.py of OpenGVLab/InternVL at 2410d1d ("Frame-1: <image>", one to a line).
    """
    if not isinstance(named, str):
        raise DataError(f"video is no path: {str(named)[:80]}; a row shows one video")
    path = locate(named, image_root)
    if not isinstance(path, Path):
        raise DataError(f"video is no path: {str(named)[:80]}; give a file")
    frames = frames_of(path, video_frames)
    shown = "\n".join(f"Frame-{number}: {IMAGE_MARK}" for number in range(1, len(frames) + 1))
    marks = sum(text.count(VIDEO_MARK) for _, text in turns)
    if marks > 1:
        raise DataError(f"video shown {marks} times: a row has one {VIDEO_MARK}")
    first = next((index for index, (role, _) in enumerate(turns) if role == "user"), 0)
    turns = [
        (role, text.replace(VIDEO_MARK, shown) if marks else f"{shown}\n{text}" if index == first else text)
        for index, (role, text) in enumerate(turns)
    ]
    return Draft(place, conversation(turns, len(frames)), tuple(frames), (named,) * len(frames), group=named, max_tiles=1)


def locate(name: str | Held, image_root: Path) -> str | Path | Held:
    """A picture as a row names it -> where it lies. Raises DataError for the web."""
    if isinstance(name, Held):
        return name
    if name[:5].lower() == "data:":
        return name
    if name.lower().startswith(("http://", "https://", "s3://")):
        raise DataError(f"picture on the web: {name[:120]}; download it and give its path")
    return image_root / (unquote(name.removeprefix("file://")) if name.startswith("file://") else name)


def _named_pictures(row: Mapping[str, Any]) -> list[str | Held]:
    names = row.get("images") or row.get("image") or []
    names = [names] if isinstance(names, str | Held) else names
    if not isinstance(names, list) or not all(isinstance(name, str | Held) and name for name in names):
        raise DataError(f"image is no path: {str(names)[:80]}; must be text or a list of texts")
    return names


def _asked_and_answered(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows of question and answer; of several answers the most frequent, as of VQA's ten."""
    asked, answer = row["question"], row.get("answer", row.get("answers"))
    if isinstance(answer, list) and answer and all(isinstance(one, str) for one in answer):
        answer = max(answer, key=answer.count)
    if not isinstance(asked, str) or not isinstance(answer, str):
        raise DataError(f"no text: question is {str(asked)[:40]!r}, answer {str(answer)[:40]!r}; both must be text")
    return [("user", asked), ("assistant", answer)]


def _with_system(row: Mapping[str, Any], turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The row's own system text before the turns. Raises DataError when it has two."""
    system = row.get("system")
    if not system:
        return turns
    if not isinstance(system, str):
        raise DataError(f"system is no text: {str(system)[:40]!r}")
    if turns[0][0] == "system":
        raise DataError("system text twice: beside the turns and as the first of them")
    return [("system", system), *turns]


def _llava_turns(raw: Any) -> list[tuple[str, str]]:
    if not isinstance(raw, list) or not raw:
        raise DataError("no conversation: conversations must be a list of turns")
    turns = []
    for turn in raw:
        said = turn.get("value", turn.get("content")) if isinstance(turn, Mapping) else None
        if not isinstance(said, str):
            raise DataError(f"broken turn: {str(turn)[:80]}; must be {{from, value}} with text as value")
        turns.append((_role(turn.get("from", turn.get("role"))), said))
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
        if VIDEO_MARK in text:
            raise DataError(f"video missing: {VIDEO_MARK} is written, but the row names no video")
