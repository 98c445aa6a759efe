"""A run, or several side by side, as one HTML page that needs nothing else: curves, answers, recipe, data, environment.

In: Runs.  Out: HTML; report.html in the run's folder.
"""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tessella.evaluate import curve
from tessella.files import write_whole
from tessella.runs.folder import Run, Series, differences, read_run

PAGE = "report.html"
MOST_POINTS = 400  # of a curve that is drawn; a longer one is drawn as means
HOME = Path(__file__).parent / "templates"
STYLE = Path(curve.__file__).parent / "templates"  # page.css, as evaluate's report has it
EVENTS = ("jump", "back", "end")


def write_page(folder: Path) -> Path:
    """report.html of a run, from what its folder holds. Raises DataError, WriteError."""
    path = folder / PAGE
    write_whole(path, as_html([read_run(folder)]))
    return path


def as_html(runs: list[Run]) -> str:
    """One page. Two runs and more are drawn into the same curves, and what differs in their recipes is told."""
    environment = Environment(
        loader=FileSystemLoader([HOME, STYLE]), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )  # fmt: skip
    environment.filters |= {"number": number, "clock": clock}
    alone = runs[0] if len(runs) == 1 else None
    before, after = answers(alone) if alone else ([], [])
    return environment.get_template("run.html.j2").render(
        title=" | ".join(run.name for run in runs),
        runs=runs,
        run=alone,
        numbers=numbers(runs),
        curves=curves(runs),
        answers=list(zip(before, after, strict=True)),
        told=alone.told() if alone else {},
        differing=differences(runs[0], runs[1]) if len(runs) == 2 else [],
        data=alone.record.get("data", {}) if alone else {},
        origin=alone.record.get("origin", {}) if alone else {},
        packages=alone.record.get("packages", {}) if alone else {},
        events=[row for row in alone.rows if row.get("kind") in EVENTS] if alone else [],
    )


NUMBERS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("loss", "training loss", lambda value: f"{value:.4f}"),
    ("held_out_loss", "held-out loss", lambda value: f"{value:.4f}"),
    ("score", "score of held-out answers", lambda value: f"{value:.1%}"),
    ("general_score", "general questions", lambda value: f"{value:.1%}"),
    ("general_perplexity", "perplexity of plain English", lambda value: f"{value:.2f}"),
)


def numbers(runs: list[Run]) -> list[tuple[str, list[tuple[str, str]]]]:
    """What a number was at first and at last, in each run; numbers that no run has are left out."""
    rows = []
    for key, words, form in NUMBERS:
        if any(run.series(key) for run in runs):
            ends = [(run.first(key), run.last(key)) for run in runs]
            rows.append((words, [("–" if a is None else form(a), "–" if b is None else form(b)) for a, b in ends]))
    return rows


def curves(runs: list[Run]) -> list[tuple[str, Markup]]:
    """(title, SVG): loss, score, forgetting, speed; in a comparison each line bears its run's name."""
    wanted = {
        "Loss": ("loss", "held_out_loss"),
        "Score": ("score", "general_score"),
        "Perplexity of plain English": ("general_perplexity",),
        "Learning rate": ("learning_rate",),
        "Gradient norm": ("grad_norm",),
        "Tokens a second": ("tokens_per_s",),
    }
    drawn = []
    for title, keys in wanted.items():
        lines = {_line(run, key, runs): thinned(run.series(key)) for run in runs for key in keys}
        lines = {name: points for name, points in lines.items() if points}
        if lines:
            drawn.append((title, Markup(curve.draw(lines, title.lower()))))
    return drawn


def _line(run: Run, key: str, runs: list[Run]) -> str:
    return key if len(runs) == 1 else f"{run.name}: {key}"


def thinned(points: Series) -> Series:
    """At most MOST_POINTS points, each the mean of its neighbours."""
    wide = -(-len(points) // MOST_POINTS)
    if wide <= 1:
        return points
    parts = [points[at : at + wide] for at in range(0, len(points), wide)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def answers(run: Run) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The same held-out questions as they were answered first and last, each with its picture inside the page."""
    told = [row["answers"] for row in run.rows if row.get("kind") == "answers"]
    if not told:
        return [], []
    last = {_asked(row): row for row in told[-1]}
    pairs = [(row, last[_asked(row)]) for row in told[0] if _asked(row) in last]
    return [{**row, "shown": _picture(run.folder, row)} for row, _ in pairs], [row for _, row in pairs]


def _asked(row: dict[str, str]) -> tuple[str, str]:
    return row["question"], row.get("place", "")


def _picture(folder: Path, row: dict[str, str]) -> str:
    """A data: address, "" where there is no picture."""
    path = folder / row.get("picture", "")
    if "picture" not in row or not path.is_file():
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def number(value: Any) -> str:
    """For people: 12,345; 0.0002; words as they are."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(number, value)) or "none" if isinstance(value, list) else str(value)


def clock(seconds: float | None) -> str:
    """3723.4 -> "1 h 02 min"."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(int(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
