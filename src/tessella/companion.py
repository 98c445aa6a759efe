"""Runs a command of ours for as long as the process that started it lives: python -m tessella.companion WORDS…

In: the words after `tessella`, and standard input, a pipe whose other end only the starter holds.  Out: the command's exit code.
When the starter ends, by kill -9 too, the pipe closes, and this process is told to stop in good order, as by SIGTERM.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable

from tessella.cli import main

PATIENCE_S = 10.0  # for an end in good order; then there is no waiting


def end_with_the_starter(pipe: int = 0, told: Callable[[], None] = lambda: os.kill(os.getpid(), signal.SIGTERM)) -> None:
    """Watch the pipe in a thread of its own. Nothing is ever written to it: all that can be read is its end."""

    def watch() -> None:
        while os.read(pipe, 4096):
            pass
        told()
        threading.Event().wait(PATIENCE_S)
        os._exit(1)

    threading.Thread(target=watch, name="tessella-companion", daemon=True).start()


if __name__ == "__main__":
    end_with_the_starter()
    sys.exit(main())
