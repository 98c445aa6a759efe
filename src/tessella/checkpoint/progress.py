"""A bar for work that is counted in bytes: how much, how fast, how long yet. Silent where there is no terminal.

In: what is done and how many bytes it is.  Out: a function that is called with the bytes of each piece.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

SHOWN_FROM_BYTES = 64 * 2**20  # less is done before a bar could be read


@contextlib.contextmanager
def byte_bar(what: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Shows the bar on standard error while the block runs."""
    console = Console(stderr=True)
    hidden = num_bytes < SHOWN_FROM_BYTES or not sys.stderr.isatty()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=hidden, transient=True) as bar:
        task = bar.add_task(what, total=num_bytes)
        yield lambda done: bar.advance(task, done)
