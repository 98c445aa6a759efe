"""Which questions `tessella evaluate` asks, and the table it prints.

In: the flags of the command.  Out: tasks, then rows on the screen, an HTML report, and the result for --json.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tessella.errors import DataError
from tessella.evaluate.report import as_json, percent, write_html
from tessella.evaluate.run import Row, Settings, evaluate
from tessella.evaluate.task import Item, Task, items_from, read_items
from tessella.image import LIMIT_MEGAPIXELS
from tessella.provenance import provenance
from tessella.train.dataset import read_dataset, read_recipe_data
from tessella.train.readers import read_rows
from tessella.train.recipe import load_recipe


@dataclass(frozen=True)
class Questions:
    """Where the questions come from: data, or what a recipe held out, or a folder of skills."""

    data: tuple[Path, ...] = ()
    recipe: Path | None = None  # its held-out part, exactly as its run saw it
    skills: bool = False  # each JSONL file below data is a task of its own
    image_root: Path | None = None  # of a dataset: where its picture paths start
    choices: str = "hidden"  # of FoodieQA
    held_out: float | None = None  # of a dataset: a share below 1, or a count; None: all of it
    seed: int = 0
    limit: int | None = None
    limit_megapixels: float = LIMIT_MEGAPIXELS
    metric: str = "exact"
    max_tokens: int = 32

    def tasks(self) -> list[Task]:
        """Raises DataError when there is nothing to ask, or the flags ask for two things at once."""
        self._check()
        if self.skills:
            return [self._task(path.stem, self._items(path)) for path in skill_files(self.data)]
        if self.recipe is not None:
            held_out = read_recipe_data(load_recipe(self.recipe)).held_out
            run = self.recipe.resolve().parent.name  # finetune calls each one recipe.toml
            return [self._task(run if self.recipe.stem == "recipe" else self.recipe.stem, items_from(held_out))]
        if not self.data:
            raise DataError("there are no questions; give --data PATH (or --recipe FILE, to score what a run held out)")
        items = tuple(item for path in self.data for item in self._items(path))
        return [self._task(self.data[0].stem, items)]

    def _check(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise DataError(f"limit is {self.limit}, must be at least 1, or left out for all questions")
        given = {"--data": self.data, "--skills": self.skills, "--held-out": self.held_out, "--image-root": self.image_root}
        given |= {"--choices": self.choices != "hidden", "--seed": self.seed}
        extra = [name for name, value in given.items() if value]
        if self.recipe is not None and extra:
            raise DataError(f"--recipe says all about its data; leave {' and '.join(extra)} out, or leave --recipe out")

    def metrics(self) -> Path | None:
        """The log of the run whose held-out part is scored, for the loss curve."""
        beside = None if self.recipe is None else self.recipe.with_name("metrics.jsonl")
        return beside if beside is not None and beside.is_file() else None

    def _task(self, name: str, items: tuple[Item, ...]) -> Task:
        return Task(name, items[: self.limit], self.metric, self.max_tokens)

    def _items(self, path: Path) -> tuple[Item, ...]:
        first = first_row(path) if path.is_file() else {}
        if "question" in first or ("messages" in first and "answers" in first):
            return read_items(path)
        samples, ledger = read_dataset(
            path,
            image_root=self.image_root,
            split="all" if self.held_out is None else "held_out",
            held_out=self.held_out or 0.0,
            seed=self.seed,
            choices=self.choices,
            limit_megapixels=self.limit_megapixels,
        )
        if ledger.skipped or ledger.notes:
            Console(stderr=True).print(f"{path}: {ledger.report()}", markup=False, highlight=False, soft_wrap=True)
        items = items_from(samples)
        if "answers" not in first:
            return items
        accepted = answers_by_place(path)
        found = (accepted.get(sample.place, item.answers) for item, sample in zip(items, samples, strict=True))
        return tuple(replace(item, answers=answers) for item, answers in zip(items, found, strict=True))


def first_row(path: Path) -> dict[str, Any]:
    """The first JSON line of a file; {} when it is none: an array over many lines, or damage, which the readers tell better."""
    with path.open(encoding="utf-8", errors="replace") as file:
        first = next((line for line in file if line.strip()), "")
    try:
        row = json.loads(first)
    except json.JSONDecodeError:
        return {}
    return row if isinstance(row, dict) else {}


def answers_by_place(path: Path) -> dict[str, tuple[str, ...]]:
    """Conversations with "answers" beside them, all that counts as right: "file:line" -> answers. Raises DataError."""
    found = {}
    for place, read in read_rows(path):
        answers = read.get("answers") if isinstance(read, dict) else None
        if answers is None:
            continue
        if not isinstance(answers, list) or not all(isinstance(text, str) and text.strip() for text in answers) or not answers:
            raise DataError(f"{place}: answers is {str(answers)[:60]}, must be a list of texts")
        found[place] = tuple(answers)
    return found


def skill_files(folders: tuple[Path, ...]) -> list[Path]:
    """The JSON-lines files of questions in the folder that recipes/nano/make_data.py wrote."""
    files = [path for folder in folders for path in sorted(folder.rglob("*.jsonl")) if "answers" in first_row(path)]
    if not files:
        raise DataError(
            "--skills needs --data FOLDER with the files of questions that recipes/nano/make_data.py --stage skills writes; "
            f"there are none in {', '.join(map(str, folders)) or 'no folder'}"
        )
    return files


def score(
    models: tuple[str, ...], questions: Questions, settings: Settings, output: Path, html: Path | None, forgetting: bool
) -> dict[str, Any]:
    """Ask every model every task and show the table; gives what --json writes."""
    if not models:
        raise DataError("there is no model to score; give one MODEL or more, before --data: what stands behind it is data")
    tasks, console, origin = questions.tasks(), Console(), provenance()
    results = []
    for number, task in enumerate(tasks):
        # The general questions are the same beside every task, so they are asked once.
        rows = evaluate(models, task, output, forgetting=forgetting and number == 0, settings=settings)
        console.print(table_of(task, rows))
        results.append(as_json(rows, task, origin))
        if html is not None:
            page = html if len(tasks) == 1 else html.with_name(f"{html.stem}-{task.name}{html.suffix}")
            write_html(page, rows, task, metrics=questions.metrics(), origin=origin)
            console.print(f"report: {page}", highlight=False)
    return results[0] if len(results) == 1 else {"tasks": results}


def table_of(task: Task, rows: list[Row]) -> Table:
    """One line a model: score, interval, and what sets it apart from the first."""
    table = Table(title=f"{task.name}: {len(task.items):,} questions, {task.metric}", title_justify="left")
    for name in ("model", "score", "95 % interval", "right", "against the first"):
        table.add_column(name)
    if rows[0].general is not None:
        table.add_column("general")
        table.add_column("perplexity")
    for row in rows:
        interval, test = row.score.interval, row.against_first
        against = "" if test is None else f"p = {test.p_exact:.2g}"
        cells = [
            row.label,
            percent(row.score.mean),
            f"{percent(interval.low)} to {percent(interval.high)}",
            f"{row.score.right:,} of {row.score.total:,}",
            against,
        ]
        if row.general is not None:
            cells += [f"{row.general.right} of {row.general.total}", f"{row.perplexity:.2f}"]
        table.add_row(*cells)
    return table
