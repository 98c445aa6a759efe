"""The demo ends with the web chat where a person sits before it, elsewhere with its command; a chat that fails fails no demo."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from tessella import demo_chat
from tessella.demo_chat import command, is_watched, open_chat
from tessella.errors import ConfigError
from tessella.serving import Serve, parse_adapter

LEARNED = Path("runs/demo/training")


def ended(monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None) -> tuple[list[Serve], str]:
    """What was served, and what was printed."""
    served: list[Serve] = []
    said = io.StringIO()

    def run(serve: Serve) -> None:
        served.append(serve)
        if error is not None:
            raise error

    monkeypatch.setattr(Serve, "run", run)
    console = Console(file=said, force_terminal=False, width=300)
    open_chat("tessella-nano", LEARNED, device="cpu", dtype="float32", browser=False, console=console)
    return served, said.getvalue()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_chat, "NEEDED", ("json",))


@pytest.mark.usefixtures("installed")
def test_both_models_are_served_with_the_page_open_on_their_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    (serve,), said = ended(monkeypatch)
    assert serve.model == "tessella-nano" and [parse_adapter(text) for text in serve.adapter] == [("foods", LEARNED)]
    assert serve.ui and serve.ui_compare and not serve.ui_open and (serve.device, serve.dtype) == ("cpu", "float32")
    assert serve.host == "127.0.0.1" and serve.port == 0
    assert command("tessella-nano", LEARNED) in said


@pytest.mark.usefixtures("installed")
def test_a_chat_that_cannot_be_opened_is_told_and_ctrl_c_ends_the_demo_well(monkeypatch: pytest.MonkeyPatch) -> None:
    _, said = ended(monkeypatch, ConfigError("no port is free"))
    assert "no port is free" in said
    _, said = ended(monkeypatch, KeyboardInterrupt())
    assert "To open it again" in said


def test_a_missing_extra_is_named_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_chat, "NEEDED", ("json", "no_such_module"))
    served, said = ended(monkeypatch)
    assert not served and "pip install 'tessella[serve,ui]'" in said


def test_nobody_is_kept_waiting_in_a_pipe_or_a_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert is_watched(Console(force_terminal=True))
    assert not is_watched(Console(file=io.StringIO()))
    monkeypatch.setenv("CI", "true")
    assert not is_watched(Console(force_terminal=True))
    monkeypatch.delenv("CI")
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert not is_watched(Console(force_terminal=True))
