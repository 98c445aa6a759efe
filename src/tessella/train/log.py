"""What a run tells while it runs: a live bar, TensorBoard, JSON lines, and events for a caller.

In: rows of numbers by step.  Out: output/metrics.jsonl (one object a line, "step" in each), output/tensorboard/, the terminal.
"""

import json
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tessella.chat import IMAGE_MARK
from tessella.errors import TrainingError
from tessella.files import cannot_write, write_whole

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"


@dataclass(frozen=True)
class Event:
    """Something that happened: "start", "step", "held_out", "answers", "checkpoint", "note" or "end"; values are plain JSON."""

    kind: str
    step: int
    values: dict[str, Any] = field(default_factory=dict)


class Scalars(Protocol):
    """The part of TensorBoard's SummaryWriter that we use."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...
    def add_text(self, tag: str, text_string: str, global_step: int) -> None: ...
    def close(self) -> None: ...


class Log:
    """Open for the length of a run: `with Log(...) as log`. Raises TrainingError or WriteError when it cannot be written."""

    def __init__(
        self, output: Path, *, total_steps: int, first_step: int, tensorboard: bool, device: torch.device,
        on_event: Callable[[Event], None] | None = None, console: Console | None = None,
    ):  # fmt: skip
        self.path, self.on_event, self.device = output / METRICS, on_event, device
        self.console = console or Console(stderr=True, highlight=False)
        self.rows = kept_rows(self.path, first_step)
        self.scalars: Scalars | None = None
        self.hook, threading.excepthook = threading.excepthook, _hook_of_threads
        if output.exists() and not output.is_dir():
            raise TrainingError(f"{output} is a file; a run needs a folder: give another output")
        write_whole(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows))
        self.file = self.path.open("a", encoding="utf-8")
        if tensorboard:
            self.scalars = open_tensorboard(output / TENSORBOARD, first_step)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[told]}"))
        times = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("left"))
        live = self.console.is_terminal
        self.bar = Progress(*columns, *times, console=self.console, disable=not live, transient=False)
        self.task = self.bar.add_task("teaching", total=total_steps, completed=first_step, told="")
        self.live, self.total_steps = live, total_steps

    def __enter__(self) -> "Log":
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()
        lost: OSError | None = None
        for written in (self.file, self.scalars):  # closing writes what is still in memory, and a full disk refuses again
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

    def held_out(self, step: int, loss: float, samples: int) -> None:
        self._write("held_out", step, {"held_out_loss": loss, "held_out_samples": samples})
        self.say(f"step {step}: held-out loss {loss:.4f} over {samples:,} samples")

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
        try:
            self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self.file.flush()
            if self.scalars is not None:
                self._to_tensorboard(step, values)
        except OSError as error:
            raise TrainingError(
                f"{self.path.parent} takes no more of the log ({error.strerror}); make room, then resume"
            ) from error
        if self.on_event:
            self.on_event(Event(kind, step, values))

    def _to_tensorboard(self, step: int, values: dict[str, Any]) -> None:
        assert self.scalars is not None
        for name, value in values.items():
            if isinstance(value, int | float):
                self.scalars.add_scalar(name, value, step)
        if "answers" in values:
            lines = (f"{row['question']} → {row['answer']} ({row['expected']})" for row in values["answers"])
            self.scalars.add_text("answers", "\n\n".join(lines), step)

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a number over the whole run, earlier sittings included."""
        return [(row["step"], row[name]) for row in self.rows if name in row]

    def memory_gib(self) -> float:
        """GPU: the most that was allocated. CPU: resident memory of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return float(psutil.Process().memory_info().rss / 2**30)


def open_tensorboard(folder: Path, first_step: int) -> Scalars:
    """A SummaryWriter. Raises WriteError."""
    from torch.utils.tensorboard import SummaryWriter  # heavy (a second) and in the train extra only

    try:
        writer: Scalars = SummaryWriter(str(folder), purge_step=first_step + 1)
    except OSError as error:
        raise cannot_write(folder, error) from error
    return writer


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
