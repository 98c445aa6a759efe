"""What a run tells while it runs: a live bar, JSON lines, trackers (TensorBoard and others), and events for a caller.

In: rows of numbers by step.  Out: output/metrics.jsonl (one object a line, "step" in each), the trackers, the terminal.
A rank that is not the first keeps its rows to itself.
"""

import json
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tessella.chat import IMAGE_MARK
from tessella.errors import TrainingError
from tessella.files import cannot_write, write_whole
from tessella.train.trackers import Tracker

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Event:
    """Something that happened: "start", "step", "held_out", "answers", "checkpoint", "note" or "end"; values are plain JSON."""

    kind: str
    step: int
    values: dict[str, Any] = field(default_factory=dict)


class Log:
    """Open for the length of a run: `with Log(...) as log`. Raises TrainingError or WriteError when it cannot be written."""

    def __init__(
        self, output: Path, *, total_steps: int, first_step: int, device: torch.device, main: bool = True,
        trackers: Callable[[int], list[Tracker]] = lambda first_step: [],
        on_event: Callable[[Event], None] | None = None, console: Console | None = None,
    ):  # fmt: skip
        """trackers: opens them, from a step on; called again when the run steps back."""
        self.path, self.on_event, self.device = output / METRICS, on_event if main else None, device
        self.console = console or Console(stderr=True, highlight=False, quiet=not main)
        self.rows = kept_rows(self.path, first_step) if main else []
        self.hook, threading.excepthook = threading.excepthook, _hook_of_threads
        self.file: IO[str] | None = None
        if output.exists() and not output.is_dir():
            raise TrainingError(f"{output} is a file; a run needs a folder: give another output")
        self.open_trackers, self.trackers = trackers, list[Tracker]()
        if main:
            self._open(first_step)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[told]}"))
        times = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("left"))
        live = self.console.is_terminal and main
        self.bar = Progress(*columns, *times, console=self.console, disable=not live, transient=False)
        self.task = self.bar.add_task("teaching", total=total_steps, completed=first_step, told="")
        self.live, self.total_steps = live, total_steps

    def _open(self, first_step: int) -> None:
        write_whole(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows))
        self.file = self.path.open("a", encoding="utf-8")
        self.trackers = self.open_trackers(first_step)

    def rewind(self, step: int) -> None:
        """Forget what was told of later steps: the run goes on from here."""
        self.rows = [row for row in self.rows if row["step"] <= step]
        if self.file is not None:
            self.file.close()
            for tracker in self.trackers:
                tracker.close()
            self._open(step)
        self.bar.update(self.task, completed=step)

    def __enter__(self) -> "Log":
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()
        lost: OSError | None = None
        for written in (self.file, *self.trackers):  # closing writes what is still in memory, and a full disk refuses again
            try:
                if written is not None:
                    written.close()
            except OSError as refused:
                lost = refused
        threading.excepthook = self.hook
        if lost is not None and error is None:  # otherwise what stopped the run is what must be told
            raise cannot_write(self.path.parent, lost) from lost

    def advance(self, step: int) -> None:
        """A step is done; moves the bar alone."""
        self.bar.update(self.task, completed=step)

    def step(self, step: int, values: dict[str, float], seconds_left: float) -> None:
        """Numbers of the steps since the last report. values: loss, learning_rate, grad_norm, tokens_per_s, memory_gib, …"""
        self._write("step", step, values)
        told = f"loss {values['loss']:.4f}  {values['tokens_per_s']:,.0f} tokens/s  {values['memory_gib']:.1f} GiB"
        told += f"  {values['mfu']:.0%} of peak" if "mfu" in values else ""
        told += f"  {values['reward_accuracy']:.0%} of pairs right" if "reward_accuracy" in values else ""
        self.bar.update(self.task, completed=step, told=told)
        if not self.live:
            self.console.print(f"step {step}/{self.total_steps}  {told}  {clock(seconds_left)} left", soft_wrap=True)

    def held_out(self, step: int, numbers: dict[str, float]) -> None:
        """numbers: held_out_loss and held_out_samples; score and scored; general questions by their names."""
        self._write("held_out", step, numbers)
        told = []
        if "held_out_loss" in numbers:
            told.append(f"held-out loss {numbers['held_out_loss']:.4f} over {numbers['held_out_samples']:,} samples")
        if "score" in numbers:
            told.append(f"score {numbers['score']:.1%} of {numbers['scored']:,} answers")
        told += [f"{name.replace('_', ' ')} {numbers[name]:.3f}" for name in numbers if name.startswith("general")]
        self.say(f"step {step}: {', '.join(told)}")

    def answers(self, step: int, answers: list[dict[str, str]]) -> None:
        """answers: rows of question, expected, answer."""
        self._write("answers", step, {"answers": answers})
        for row in answers:
            question = row["question"].replace(IMAGE_MARK, "").strip()
            self.say(f"  {question!r} -> {row['answer']!r} (expected {row['expected']!r})")

    def note(self, step: int, text: str, kind: str = "note", **values: Any) -> None:
        """Something to be told in words."""
        self._write(kind, step, {"text": text, **values})
        self.say(text)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def _write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        row = {"step": step, "kind": kind, **values}
        self.rows.append(row)
        if self.file is None:
            return
        try:
            self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self.file.flush()
            for tracker in self.trackers:
                tracker.tell(step, values)
        except OSError as error:
            raise TrainingError(
                f"{self.path.parent} takes no more of the log ({error.strerror}); make room, then resume"
            ) from error
        if self.on_event:
            self.on_event(Event(kind, step, values))

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a number over the whole run, earlier sittings included."""
        return [(row["step"], row[name]) for row in self.rows if name in row]

    def memory_gib(self) -> float:
        """GPU: the most that was allocated. CPU: resident memory of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return float(psutil.Process().memory_info().rss / 2**30)


def _hook_of_threads(args: threading.ExceptHookArgs) -> None:
    """As Python's own, but an OSError (a full disk) of TensorBoard's writer prints no trace: add_scalar raises it again."""
    if not (issubclass(args.exc_type, OSError) and type(args.thread).__name__ == "_AsyncWriterThread"):
        threading.__excepthook__(args)


def kept_rows(path: Path, first_step: int) -> list[dict[str, Any]]:
    """Rows of an earlier sitting up to the step that is resumed from; a last line that was cut off is dropped."""
    if first_step == 0 or not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # the sitting was killed in the middle of this line; what follows is of the same moment
        if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= first_step:
            rows.append(row)
    return rows


def clock(seconds: float) -> str:
    """3723.4 -> "1:02:03"."""
    if not math.isfinite(seconds):
        return "?"
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
