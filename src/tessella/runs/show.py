"""`tessella runs`, done: a table of runs, one run, or two side by side.

In: folders.  Out: text on the screen, a page where one is asked for, and the same as JSON.
"""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tessella.errors import ConfigError, DataError
from tessella.files import check_place, write_whole
from tessella.runs.folder import Run, differences, find_runs, is_run, read_run
from tessella.runs.page import as_html, clock, number, numbers, write_page


def show(folders: tuple[Path, ...], html: Path | None) -> dict[str, Any]:
    """Raises ConfigError, DataError, WriteError."""
    console = Console()
    if html is not None:
        check_place("--html", html.expanduser())
    if len(folders) == 1 and not is_run(folders[0]):
        runs = find_runs(folders[0])
        if html is not None:
            raise ConfigError(f"--html {html}: a page is made of one run, or of two; {folders[0]} is a folder of runs")
        if not runs:
            raise DataError(f"{folders[0]} holds no run; give the folder that finetune's --output lies in")
        listed(console, runs)
        return {"runs": [run.as_json() for run in runs]}
    if len(folders) > 2:
        raise ConfigError(f"{len(folders)} runs were given; one is shown, two are compared")
    runs = [read_run(folder) for folder in folders]
    if len(runs) == 1:
        one(console, runs[0])
        console.print(f"page: {write_page(runs[0].folder)}", markup=False, soft_wrap=True)
    else:
        compared(console, runs[0], runs[1])
    if html is not None:
        write_whole(html.expanduser(), as_html(runs))
        console.print(f"page: {html}", markup=False, soft_wrap=True)
    result: dict[str, Any] = {"runs": [run.as_json() for run in runs]}
    if len(runs) == 2:
        result["differing"] = [{"field": name, "values": [a, b]} for name, a, b in differences(*runs)]
    return result


def listed(console: Console, runs: list[Run]) -> None:
    """A line a run, the newest last."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "state", "steps", "loss", "held out", "score", "time", "model"):
        table.add_column(name, overflow="fold", justify="left" if name in ("run", "state", "model") else "right")
    for run in runs:
        table.add_row(
            str(run.folder), run.state, f"{run.steps:,} of {run.total_steps:,}", decimals(run.last("loss")),
            decimals(run.last("held_out_loss")), percent(run.last("score")), clock(run.last("seconds")),
            Path(str(run.recipe.get("model", ""))).name,
        )  # fmt: skip
    console.print(table)


def one(console: Console, run: Run) -> None:
    """What a run was told, and what came of it."""
    console.print(
        f"{run.folder}: {run.state}, {run.steps:,} of {run.total_steps:,} steps, {clock(run.last('seconds'))}", markup=False
    )
    if run.record.get("reason"):
        console.print(str(run.record["reason"]), markup=False, soft_wrap=True)
    ends(console, [run])
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, value in run.told().items():
        table.add_row(name, number(value))
    console.print(table)


def compared(console: Console, a: Run, b: Run) -> None:
    """What differs in two recipes, and what came of each."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", a.name if a.name != b.name else str(a.folder), b.name if a.name != b.name else str(b.folder)):
        table.add_column(name, overflow="fold")
    for name, ours, theirs in differences(a, b):
        table.add_row(name, number(ours), number(theirs))
    if not table.row_count:
        table.add_row("the same recipe", "", "")
    table.add_row("state", a.state, b.state)
    table.add_row("steps", f"{a.steps:,} of {a.total_steps:,}", f"{b.steps:,} of {b.total_steps:,}")
    table.add_row("time", clock(a.last("seconds")), clock(b.last("seconds")))
    console.print(table)
    ends(console, [a, b])


def ends(console: Console, runs: list[Run]) -> None:
    """Numbers at first and at last."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for run in runs:
        for when in ("at first", "at last"):
            table.add_column(when if len(runs) == 1 else f"{run.name} {when}", justify="right", overflow="fold")
    for words, values in numbers(runs):
        table.add_row(words, *(value for pair in values for value in pair))
    console.print(table)


def decimals(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
