"""A run's folder, read: what it was told, what it learned from, its numbers, and how it ended.

In: a folder that finetune wrote, whether the run ended, was killed, or still goes on.  Out: a Run.
"""

import fcntl
import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from tessella.errors import DataError
from tessella.train.recipe import FREE_ON_RESUME, Recipe
from tessella.train.recipe.values import plain

METRICS, RECORD, RECIPE, LOCK = "metrics.jsonl", "run.json", "recipe.toml", "run.lock"
DEEPEST = 4  # folders below the one that is searched
Series = list[tuple[int, float]]


@dataclass(frozen=True)
class Run:
    """What a run's folder holds."""

    folder: Path
    record: dict[str, Any]  # run.json; {} of a run from before there was one
    recipe: dict[str, Any]  # recipe.toml
    rows: list[dict[str, Any]]  # metrics.jsonl

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def state(self) -> str:
        """ "finished", "stopped", "failed", "running", or "killed": it never said how it ended."""
        said = str(self.record.get("state", "unknown"))
        return ("running" if held(self.folder / LOCK) else "killed") if said == "running" else said

    @property
    def steps(self) -> int:
        return max((row["step"] for row in self.rows), default=0)

    @property
    def total_steps(self) -> int:
        return int(self.record.get("total_steps", 0))

    def series(self, name: str) -> Series:
        """(step, value) of a number."""
        return [(row["step"], float(row[name])) for row in self.rows if isinstance(row.get(name), int | float)]

    def first(self, name: str) -> float | None:
        found = self.series(name)
        return found[0][1] if found else None

    def last(self, name: str) -> float | None:
        found = self.series(name)
        return found[-1][1] if found else None

    @property
    def began(self) -> tuple[str, float]:
        """When its last sitting began: the date, and more finely."""
        return str(self.record.get("origin", {}).get("date", "")), float(self.record.get("began", 0.0))

    def told(self) -> dict[str, Any]:
        """The fields of the recipe that are not its defaults."""
        usual = {field.name: plain(getattr(Recipe(), field.name)) for field in fields(Recipe)}
        return {name: value for name, value in self.recipe.items() if name != "resume" and value != usual.get(name)}

    def as_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder), "state": self.state, "steps": self.steps, "total_steps": self.total_steps,
            "model": self.recipe.get("model", ""), "loss": self.last("loss"), "held_out_loss": self.last("held_out_loss"),
            "score": self.last("score"), "tokens_per_s": self.last("tokens_per_s"), "seconds": self.last("seconds"),
            "ranks": self.record.get("ranks", 1), "started": self.record.get("origin", {}).get("date", ""),
        }  # fmt: skip


def held(lock: Path) -> bool:
    """Whether a living run holds its lock."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # no lock: nobody is there
    return False


def is_run(folder: Path) -> bool:
    return (folder / METRICS).is_file() or (folder / RECORD).is_file()


def read_run(folder: Path) -> Run:
    """Raises DataError when folder holds no run."""
    if not is_run(folder):
        raise DataError(f"{folder} holds no run: neither {METRICS} nor {RECORD}; give the --output of a finetune")
    return Run(folder, _json(folder / RECORD), _toml(folder / RECIPE), list(_rows(folder / METRICS)))


def find_runs(folder: Path) -> list[Run]:
    """All runs in a folder and below, the newest last. Raises DataError when there is no such folder."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give one that holds runs, as finetune's --output names them")
    found = [read_run(place) for place in _places(folder, DEEPEST)]
    return sorted(found, key=lambda run: (*run.began, str(run.folder)))


def _places(folder: Path, deepest: int) -> Iterator[Path]:
    if is_run(folder):
        yield folder  # what lies in a run is its own
        return
    if deepest:
        for below in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
            yield from _places(below, deepest - 1)


def differences(a: Run, b: Run) -> list[tuple[str, Any, Any]]:
    """Fields of the recipe that differ; what decides what is learned comes first."""
    usual = {field.name: plain(getattr(Recipe(), field.name)) for field in fields(Recipe)}
    names = [name for name in usual if name not in ("resume", "output")]
    both = [(name, a.recipe.get(name, usual[name]), b.recipe.get(name, usual[name])) for name in names]
    return sorted((row for row in both if row[1] != row[2]), key=lambda row: row[0] in FREE_ON_RESUME)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a run; what was cut off by a kill, or is being written now, is left out."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); move it away to read the rest of the run") from error
    return values if isinstance(values, dict) else {}


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not TOML ({error}); mend it, or move it away to read the rest of the run") from error
