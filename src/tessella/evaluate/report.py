"""The result for people and for programs: one HTML page that needs nothing beside it, and the same as JSON.

In: the rows of evaluate(), the task, and where the numbers came from.  Out: text of a page, or a dict of stable keys.
"""

import base64
import io
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tessella.errors import ImageError
from tessella.evaluate.curve import loss_curve
from tessella.evaluate.metrics import METRICS, McNemar
from tessella.evaluate.run import Row, Score
from tessella.evaluate.task import Item, Task
from tessella.files import write_whole
from tessella.image import open_image
from tessella.inputs import Picture
from tessella.provenance import Provenance, provenance

MOST_ITEMS = 200  # shown with their pictures, about 8 KB each; all answers lie in the answers folder
MOST_LABELS = 60  # rows of the table of confusions
THUMBNAIL_PX = 208


@dataclass(frozen=True)
class Card:
    """One item as the page shows it. change: "gained", "lost", "wrong" or "right", from the first model to the last."""

    item: Item
    pictures: tuple[str, ...]  # data: addresses
    answers: tuple[tuple[str, str, bool, str], ...]  # label of the model, text, right, why it failed
    change: str


@dataclass(frozen=True)
class Confusion:
    """One label and, for each model, right, total, and what it said instead, most often first."""

    label: str
    models: tuple[tuple[int, int, tuple[tuple[str, int], ...]], ...]


def as_json(rows: Sequence[Row], task: Task, origin: Provenance | None = None) -> dict[str, Any]:
    """The result under stable keys; docs/json.md says what each is."""
    origin = origin or provenance()
    return {
        "command": "evaluate",
        "version": 1,
        "task": task.name,
        "metric": task.metric,
        "items": len(task.items),
        "origin": asdict(origin),
        "rows": [_row_json(row, rows[0]) for row in rows],
    }


def _row_json(row: Row, first: Row) -> dict[str, Any]:
    return {
        "model": row.model,
        "label": row.label,
        **_score_json(row.score),
        "against_first": _test_json(row.against_first, first),
        "seconds": round(row.seconds, 3),
        "taken_over": row.taken_over,
        "device": row.device,
        "dtype": row.dtype,
        "answers": str(row.answers_file),
        "general": None
        if row.general is None
        else {**_score_json(row.general), "against_first": _test_json(row.general_against_first, first)},
        "perplexity": row.perplexity,
    }


def _score_json(score: Score) -> dict[str, Any]:
    interval = score.interval
    return {
        "score": score.mean,
        "low": interval.low,
        "high": interval.high,
        "right": score.right,
        "total": score.total,
        "failed": score.failed,
    }


def _test_json(test: McNemar | None, first: Row) -> dict[str, Any] | None:
    return None if test is None else {"model": first.model, **test._asdict()}


def write_html(
    path: str | Path,
    rows: Sequence[Row],
    task: Task,
    *,
    title: str = "",
    metrics: Path | None = None,
    origin: Provenance | None = None,
    most_items: int = MOST_ITEMS,
) -> None:
    """The page into a file. metrics: a run's metrics.jsonl for the loss curve. Raises DataError, WriteError."""
    write_whole(Path(path), as_html(rows, task, title=title, metrics=metrics, origin=origin, most_items=most_items))


def as_html(
    rows: Sequence[Row],
    task: Task,
    *,
    title: str = "",
    metrics: Path | None = None,
    origin: Provenance | None = None,
    most_items: int = MOST_ITEMS,
) -> str:
    """The page as text: self-contained, pictures and curve inside, no script."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, p_value=p_value)
    questions = {item.question for item in task.items}
    shown = cards(rows, task, most_items)
    page = environment.get_template("report.html.j2").render(
        title=title or f"{task.name}: {' | '.join(row.label for row in rows)}",
        task=task,
        metric=METRICS[task.metric],
        rows=rows,
        cards=shown,
        counts=Counter(change for change in changes(rows)),
        one_question=questions.pop() if len(questions) == 1 else "",
        confusions=confusions(rows, task),
        curve=Markup(loss_curve(metrics)) if metrics else "",
        curve_from=str(metrics or ""),
        origin=origin or provenance(),
    )
    return page + "\n"


def percent(share: float) -> str:
    """0.0823 -> "8.2 %" with a space that does not break."""
    return f"{100 * share:.1f}\u00a0%"


def p_value(p: float) -> str:
    """A p-value as people write it."""
    return "p\u00a0<\u00a00.0001" if p < 1e-4 else f"p\u00a0=\u00a0{p:.4f}" if p < 0.01 else f"p\u00a0=\u00a0{p:.2f}"


def _clean(value: object) -> object:
    """Characters that HTML forbids (a model may say anything) become the replacement sign."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join("\ufffd" if _forbidden(mark) else mark for mark in value)


def _forbidden(mark: str) -> bool:
    """Control characters, lone surrogates and noncharacters."""
    return (unicodedata.category(mark) in ("Cc", "Cs") and mark not in "\n\t") or ord(mark) & 0xFFFE == 0xFFFE


def changes(rows: Sequence[Row]) -> list[str]:
    """For each item "gained", "lost", "right" or "wrong", from the first model to the last."""
    names = {(False, True): "gained", (True, False): "lost", (True, True): "right", (False, False): "wrong"}
    pairs = zip(rows[0].score.answers, rows[-1].score.answers, strict=True)
    return [names[first.right, last.right] for first, last in pairs]


def cards(rows: Sequence[Row], task: Task, most: int) -> list[Card]:
    """The items to show: those that changed first, in the order of the task within each group, at most `most`.

    When there are more, each group gets its share, so that a page of 200 gains does not hide what was lost.
    """
    groups: dict[str, list[int]] = {"lost": [], "gained": [], "wrong": [], "right": []}
    for index, change in enumerate(changes(rows)):
        groups[change].append(index)
    quota = _quotas({name: len(group) for name, group in groups.items()}, most)
    return [_card(rows, task.items[index], index, name) for name, group in groups.items() for index in group[: quota[name]]]


def _quotas(sizes: dict[str, int], most: int) -> dict[str, int]:
    """How many of each group: equal shares, and what a small group leaves goes to the others."""
    quota, left = dict.fromkeys(sizes, 0), most
    while left and any(quota[name] < size for name, size in sizes.items()):
        for name, size in sizes.items():
            if left and quota[name] < size:
                quota[name] += 1
                left -= 1
    return quota


def _card(rows: Sequence[Row], item: Item, index: int, change: str) -> Card:
    judged = [(row.label, row.score.answers[index]) for row in rows]
    answers = tuple((label, answer.text, answer.right, answer.failed) for label, answer in judged)
    return Card(item, tuple(thumbnail(picture) for picture in item.pictures[:4]), answers, change)


def thumbnail(picture: Picture) -> str:
    """A small JPEG as a data: address; "" for a picture that cannot be read (its item says why)."""
    try:
        image = open_image(picture.source)
    except ImageError:
        return ""
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def confusions(rows: Sequence[Row], task: Task) -> list[Confusion]:
    """Label -> what each model said, worst label of the last model first; items without a label have no row."""
    read = task.judge.read
    places: dict[str, list[int]] = {}
    for index, item in enumerate(task.items):
        if item.label:
            places.setdefault(item.label, []).append(index)
    found = [Confusion(label, tuple(_said(row.score, indices, read) for row in rows)) for label, indices in places.items()]
    # Labels that everyone always gets right teach nothing; without a mistake there is no table.
    found = [one for one in found if any(right < total for right, total, _ in one.models)]
    return sorted(found, key=lambda one: one.models[-1][0] / one.models[-1][1])[:MOST_LABELS]


def _said(score: Score, indices: Sequence[int], read: Any) -> tuple[int, int, tuple[tuple[str, int], ...]]:
    answers = [score.answers[index] for index in indices]
    wrong = Counter("(not asked)" if one.failed else read(one.text) or "(nothing)" for one in answers if not one.right)
    return sum(one.right for one in answers), len(answers), tuple(wrong.most_common(4))
