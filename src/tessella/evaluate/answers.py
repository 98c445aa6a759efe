"""The answers of one model, kept as JSON lines so that a run that was stopped goes on where it was.

In: a path and the words that say what was asked of whom.  Out: answers read back, or written one batch at a time.
The first line is the header; each later line one answer.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tessella.errors import DataError
from tessella.files import cannot_write, write_whole

FORMAT = "tessella answers 1"
FINGERPRINTED = ("config.json", "adapter_config.json", "tokenizer*", "*.safetensors")


@dataclass(frozen=True)
class Answer:
    """What a model said to one item. failed: why the item could not be asked, "" when it could."""

    key: str
    text: str
    failed: str = ""


def fingerprint(folder: Path) -> str:
    """A name for the weights in a folder by file names, sizes and times, so that a model taught anew is not mistaken."""
    found = sorted(path for pattern in FINGERPRINTED for path in folder.glob(pattern))
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]


class AnswerFile:
    """Answers on disk under a header. Opening it reads what is there; add() appends and flushes to the disk."""

    def __init__(self, path: Path, header: dict[str, str]):
        self.path, self.header = path, {"format": FORMAT, **header}
        self.answers: dict[str, Answer] = {}
        if path.is_file():
            self._read()
        else:
            write_whole(path, _line(self.header))

    def has(self, key: str) -> bool:
        """Whether an answer is there; a failure is none."""
        return key in self.answers and not self.answers[key].failed

    def add(self, answers: Iterable[Answer]) -> None:
        """Append answers and see them to the disk. Raises WriteError; what was kept before stays."""
        answers = list(answers)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(_line(asdict(answer)) for answer in answers)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self.answers.update((answer.key, answer) for answer in answers)

    def _read(self) -> None:
        """Take over what is there; a last line that was cut off in the middle goes. Raises DataError."""
        raw = self.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        lines = whole.decode("utf-8").split("\n")[:-1]
        found = _parse(lines[0], self.path, 1) if lines else None
        if found != self.header:
            raise DataError(f"{self.path}:1 is not the header that belongs to these questions; remove the file to ask again")
        for number, line in enumerate(lines[1:], 2):
            answer = Answer(**_parse(line, self.path, number))
            self.answers[answer.key] = answer
        if len(whole) < len(raw):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _parse(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number} is not JSON ({error}); remove the file to ask again") from error
    if not isinstance(row, dict) or (number > 1 and set(row) != {"key", "text", "failed"}):
        raise DataError(f"{path}:{number} is no answer; remove the file to ask again")
    return row
