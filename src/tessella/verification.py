"""`tessella verify`: two models compared, as a table on the screen and as JSON.

In: what a person named as A and B.  Out: the result; its key "differs" decides the exit code.
"""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from tessella.checkpoint.engines import ask, engines_named, pythons_named
from tessella.checkpoint.proof import Mode, prove
from tessella.checkpoint.source import KINDS, open_source
from tessella.model.device import choose_device


def verify(a: str, b: str, mode: Mode, device: str, engines: str, engine_pythons: Sequence[str] = ()) -> dict[str, Any]:
    """Compare and print. engines: names of other engines that are to answer from B, comma between them.

    engine_pythons: ENGINE=/path/to/python for those that live in an environment of their own.

    Raises CheckpointError, ConfigError when one side cannot be read.
    """
    others = engines_named(engines)
    pythons = pythons_named(engine_pythons, others)
    left, right = open_source(a), open_source(b)
    proofs = prove(left, right, mode=mode, device=choose_device(device))
    console = Console()
    for word, source in (("A", left), ("B", right)):
        console.print(f"{word}  {source.path}: {KINDS[source.kind]}", highlight=False, soft_wrap=True)
    show(proofs.rows(), console)
    answers = [ask(engine, right, pythons.get(engine)) for engine in others]
    for answer in answers:
        show(answer.rows(), console)
    differs = not proofs.holds or any(answer.version and not answer.holds for answer in answers)
    return {
        "a": str(left.path),
        "b": str(right.path),
        "differs": bool(differs),
        "proof": proofs.as_json(),
        "engines": [answer.as_json() for answer in answers],
    }


def show(rows: list[tuple[str, str, bool | None]], console: Console) -> None:
    """What was compared, whether it is equal, and what came out."""
    table = Table(box=None, pad_edge=False, show_header=False)
    words = {True: "equal", False: "[bold red]DIFFERS[/]", None: "-"}
    for what, told, equal in rows:
        table.add_row(what, words[equal], told)
    console.print(table, highlight=False)
