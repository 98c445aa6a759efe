"""Several models side by side on the same items: asked, kept, judged.

In: names or folders of models and a Task.  Out: one Row a model, answers aligned item by item.
Models are loaded one after the other and freed; answers are made through inputs.py and generate.py, greedily.
"""

import gc
import hashlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tessella.checkpoint.adapters import learned_in
from tessella.checkpoint.read import Loaded, load
from tessella.errors import ConfigError, ContextError, DataError, ImageError, MemoryError_, PromptError
from tessella.evaluate.answers import Answer, AnswerFile, fingerprint
from tessella.evaluate.metrics import RIGHT_FROM, Interval, McNemar, mcnemar, wilson
from tessella.evaluate.skills import perplexity
from tessella.evaluate.task import Item, Task
from tessella.evaluate.tasks import TASKS
from tessella.evaluate.tasks.general import PASSAGE
from tessella.generate import generate_batch
from tessella.image import LIMIT_MEGAPIXELS
from tessella.inputs import ModelInput
from tessella.sampling import GREEDY, SamplingParams


@dataclass(frozen=True)
class Settings:
    """How models are run. None leaves a choice to the model."""

    device: str = "auto"
    dtype: str = "auto"
    max_tiles: int | None = None
    system: str | None = None
    batch_items: int = 16  # items that run together, at least 1; halved by itself when memory runs out
    limit_megapixels: float = LIMIT_MEGAPIXELS  # of a picture

    def __post_init__(self) -> None:
        if self.batch_items < 1:
            raise ConfigError(f"batch_items is {self.batch_items}, must be at least 1")


@dataclass(frozen=True)
class Judged:
    """One answer and what it is worth."""

    key: str
    text: str
    score: float
    failed: str = ""

    @property
    def right(self) -> bool:
        return self.score >= RIGHT_FROM


@dataclass(frozen=True)
class Score:
    """A model's answers to a task, in the order of the items, and their mean."""

    task: str
    metric: str
    answers: tuple[Judged, ...]

    @property
    def total(self) -> int:
        return len(self.answers)

    @property
    def right(self) -> int:
        return sum(answer.right for answer in self.answers)

    @property
    def failed(self) -> int:
        return sum(bool(answer.failed) for answer in self.answers)

    @property
    def mean(self) -> float:
        return sum(answer.score for answer in self.answers) / self.total

    @property
    def interval(self) -> Interval:
        return wilson(sum(answer.score for answer in self.answers), self.total)

    def against(self, first: "Score") -> McNemar:
        """McNemar's test on the items that both answered."""
        return mcnemar([answer.right for answer in first.answers], [answer.right for answer in self.answers])


@dataclass(frozen=True)
class Row:
    """One model's result. general and perplexity are the forgetting check, None when it was not asked for."""

    model: str  # as given
    label: str  # for people
    score: Score
    against_first: McNemar | None  # None for the first model
    seconds: float  # spent on answering in this run; answers taken over from an earlier run cost nothing
    taken_over: int  # answers that an earlier run had kept
    device: str
    dtype: str
    answers_file: Path
    general: Score | None = None
    general_against_first: McNemar | None = None
    perplexity: float | None = None


def evaluate(
    models: Sequence[str | Path],
    task: Task,
    folder: str | Path,
    *,
    labels: Sequence[str] | None = None,
    forgetting: bool = False,
    settings: Settings | None = None,
    console: Console | None = None,
) -> list[Row]:
    """Ask each model the same items and judge the answers; the first model is what the others are compared with.

    folder: where answers are kept (folder/answers/*.jsonl); a rerun with the same weights, questions and settings goes on
    from them. forgetting: ask the general
    questions too and read the passage. An item that a model cannot be asked (its picture is broken, its prompt too
    long) counts as wrong and says why. Raises ConfigError for models given twice or labels that do not fit, DataError
    when no item could be asked or a file of answers is damaged, and what loading raises.
    """
    names = [str(model) for model in models]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"models are {names}: give at least one, and each only once")
    labels = list(labels) if labels is not None else _labels(names)
    if len(labels) != len(names):
        raise ConfigError(f"{len(labels)} labels for {len(names)} models; give one each or none")
    settings = settings or Settings()
    rows: list[Row] = []
    with _progress(console) as progress:
        for name, label in zip(names, labels, strict=True):
            row = evaluate_one(name, label, task, Path(folder), forgetting, settings, progress)
            rows.append(_compared(row, rows[0]) if rows else row)
    return rows


def evaluate_one(
    name: str, label: str, task: Task, folder: Path, forgetting: bool, settings: Settings, progress: Progress
) -> Row:
    """One model: load, ask, judge, free."""
    loaded = load(name, device=settings.device, dtype=settings.dtype, max_tiles=settings.max_tiles, system=settings.system)
    loaded.inputs.limit_megapixels = settings.limit_megapixels
    begun = time.monotonic()
    file = _answer_file(name, loaded, task, folder, settings)
    taken_over = sum(file.has(item.key) for item in task.items)
    score = ask(loaded, task, file, settings.batch_items, progress, label)
    seconds = time.monotonic() - begun
    general, talk = None, None
    if forgetting:
        questions = TASKS["general"]()
        kept = _answer_file(name, loaded, questions, folder, settings)
        general = ask(loaded, questions, kept, settings.batch_items, progress, f"{label}, general questions")
        talk = perplexity(loaded, PASSAGE)
    device, dtype = str(loaded.model.device), str(loaded.model.dtype).removeprefix("torch.")
    del loaded
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return Row(name, label, score, None, seconds, taken_over, device, dtype, file.path, general, None, talk)


def ask(loaded: Loaded, task: Task, file: AnswerFile, batch_items: int, progress: Progress, label: str) -> Score:
    """Ask what file does not hold, keep it there, and judge all. Raises DataError when no item could be asked.

    An item that failed in an earlier run is asked again: its picture may have been mended.
    """
    missing = [item for item in task.items if not file.has(item.key)]
    bar = progress.add_task(label, total=len(task.items), completed=len(task.items) - len(missing))
    for answers in _answers(loaded, missing, task.max_tokens, batch_items):
        file.add(answers)
        progress.advance(bar, len(answers))
    answers = [file.answers[item.key] for item in task.items]
    if all(answer.failed for answer in answers):
        raise DataError(f"{label} could be asked none of {len(answers)} items; the first: {answers[0].failed}")
    return judge(task, answers)


def judge(task: Task, answers: Sequence[Answer]) -> Score:
    """Answers in the order of the items -> Score; a failed item scores 0."""
    judged = [
        Judged(answer.key, answer.text, 0.0 if answer.failed else task.judge.score(answer.text, item.answers), answer.failed)
        for item, answer in zip(task.items, answers, strict=True)
    ]
    return Score(task.name, task.metric, tuple(judged))


def _answers(loaded: Loaded, items: Sequence[Item], max_tokens: int, batch_items: int) -> Iterator[list[Answer]]:
    """Answers a batch at a time; a batch that does not fit into the GPU's memory is tried again in halves."""
    params = replace(GREEDY, max_tokens=max_tokens)
    at = 0
    while at < len(items):
        batch = items[at : at + batch_items]
        built = {item.key: _build(loaded, item, max_tokens) for item in batch}
        inputs = {key: one for key, one in built.items() if isinstance(one, ModelInput)}
        ids = _generate(loaded, list(inputs.values()), params, batch_items)
        if ids is None:
            batch_items //= 2
            torch.cuda.empty_cache()  # here, not where the error was caught: its traceback held the tensors
            continue
        texts = dict(zip(inputs, (loaded.tokenizer.decode(row).strip() for row in ids), strict=True))
        yield [_answer(item.key, built[item.key], texts) for item in batch]
        at += len(batch)


def _generate(loaded: Loaded, inputs: list[ModelInput], params: SamplingParams, batch_items: int) -> list[list[int]] | None:
    """The ids of the answers; None when memory ran out and fewer at once may fit. Raises MemoryError_ when one does not."""
    try:
        return generate_batch(loaded.model, inputs, params, loaded.stop_ids, rows_at_once=batch_items)
    except torch.OutOfMemoryError as error:
        if batch_items > 1:
            return None
        raise MemoryError_(
            f"one item of {len(inputs[0])} tokens and {len(inputs[0].tiles)} tiles does not fit into the memory of "
            f"{loaded.model.device}; lower max_tiles, or take dtype bfloat16"
        ) from error


def _build(loaded: Loaded, item: Item, max_tokens: int) -> ModelInput | str:
    """The item as the model will see it, or why it cannot be asked."""
    try:
        return loaded.inputs.build(item.messages, item.pictures, room=max_tokens)
    except (ImageError, ContextError, PromptError) as error:
        return str(error)


def _answer(key: str, built: ModelInput | str, texts: dict[str, str]) -> Answer:
    return Answer(key, "", built) if isinstance(built, str) else Answer(key, texts[key])


def _answer_file(name: str, loaded: Loaded, task: Task, folder: Path, settings: Settings) -> AnswerFile:
    """Where this model's answers to this task are kept; the header pins all that an answer depends on."""
    given = learned_in(Path(name).expanduser())
    weights = fingerprint(loaded.folder) + (fingerprint(given) if given.is_dir() else "")
    header = {
        "model": str(given.resolve()) if given.is_dir() else name,
        "weights": weights,
        "task": task.name,
        "questions": task.digest(),
        "dtype": str(loaded.model.dtype),
        "device": loaded.model.device.type,
        "max_tiles": str(settings.max_tiles),
        "system": str(settings.system),
    }
    # The hash keeps runs of like names apart, and a changed model, question or setting gets a file of its own.
    unique = hashlib.sha256(json.dumps(header).encode()).hexdigest()[:10]
    return AnswerFile(folder / "answers" / f"{_plain(Path(name).name)}-{_plain(task.name)}-{unique}.jsonl", header)


def _plain(name: str) -> str:
    """A name that any file system takes."""
    return re.sub(r"[^\w.-]+", "-", name)[:60] or "model"


def _compared(row: Row, first: Row) -> Row:
    general = row.general.against(first.general) if row.general and first.general else None
    return replace(row, against_first=row.score.against(first.score), general_against_first=general)


def _labels(names: Sequence[str]) -> list[str]:
    """The shortest ends of the names that tell them apart."""
    parts = [Path(name).parts or (name,) for name in names]
    for depth in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(part[-depth:]) for part in parts]
        if len(set(ends)) == len(ends):
            return ends
    return list(names)


def _progress(console: Console | None) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console or Console(stderr=True))
