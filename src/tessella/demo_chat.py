"""How the demo ends: with the web chat, where the model and what it learned answer side by side.

In: the demo's folder and model.  Out: in a terminal the chat, until Ctrl-C; in a pipe the command that opens it.
It stands beside demo.py, and its time is not counted among the demo's.
"""

import importlib.util
import os
import sys
from pathlib import Path

from rich.console import Console

from tessella.errors import TessellaError
from tessella.serving import Serve

LEARNED = "foods"  # the name by which the adapter is asked
NEEDED = ("gradio", "fastapi", "uvicorn", "llguidance", "prometheus_client")  # of the ui and the serve extra


def command(model: str, adapter: Path) -> str:
    """What a person types to have the same chat again."""
    return f"tessella serve {model} --adapter {LEARNED}={adapter} --ui --ui-compare"


def is_watched(console: Console) -> bool:
    """Whether a person sits before it: in a pipe, or in a machine that builds, nobody would press Ctrl-C."""
    return console.is_terminal and sys.stdin.isatty() and not os.environ.get("CI")


def open_chat(model: str, adapter: Path, *, device: str, dtype: str, browser: bool, console: Console) -> None:
    """The chat until Ctrl-C. What keeps it from opening is told, and is no fault of the demo that is done."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        told = f"The web chat needs {missing[0]}: pip install 'tessella[serve,ui]', then {command(model, adapter)}"
        console.print(told, highlight=False, markup=False, soft_wrap=True)
        return
    console.print(f"\n[bold]Now you: {model} and what it learned, side by side[/bold]", highlight=False)
    serve = Serve(
        model=model,
        adapter=(f"{LEARNED}={adapter}",),
        port=0,
        device=device,
        dtype=dtype,  # type: ignore[arg-type]
        ui=True,
        ui_compare=True,
        ui_open=browser,
    )
    try:
        serve.run()
    except TessellaError as error:
        console.print(f"The web chat could not be opened: {error}", highlight=False, markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        pass  # before the server listens; later it takes Ctrl-C itself and returns: either way the demo is done
    console.print(f"To open it again: {command(model, adapter)}", highlight=False, markup=False, soft_wrap=True)
