"""The page of `serve --ui` ends with the server that started it, also when that is killed; and opens with two models if told."""

import subprocess
import sys
from pathlib import Path
from urllib.error import HTTPError

import pytest

pytest.importorskip("gradio", reason="THE WEB CHAT IS NOT TESTED: gradio is not installed; it is in the ui extra")

from chat_processes import fetch, free_port, wait_for
from tessella.errors import ConfigError
from tessella.serving import Serve
from tessella.ui.client import Choice, Server
from tessella.ui.deeds import named_among
from tessella.webchat import two_names

STARTER = """
import sys, time
from tessella.webchat import beside
with beside("http://127.0.0.1:9", None, ["--port", sys.argv[1], "--no-open"]):
    time.sleep(600)
"""


def is_gone(url: str) -> bool:
    try:
        fetch(url)
    except HTTPError:
        return False
    except OSError:
        return True
    return False


def test_the_page_goes_away_when_its_server_is_killed(tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/config"
    with subprocess.Popen([sys.executable, "-c", STARTER, str(port)], stdout=subprocess.DEVNULL) as process:
        try:
            wait_for(lambda: fetch(url), 120)
        finally:
            process.kill()
    wait_for(lambda: is_gone(url), 30)


def test_two_models_are_named_with_or_without_a_comma() -> None:
    assert two_names(["a,b"]) == two_names(["a", "b"]) == two_names(["a, b"]) == ("a", "b")
    assert two_names([]) == ()
    for wrong in (["a"], ["a,"], ["a", "b", "c"], ["a,b,c"]):
        with pytest.raises(ConfigError, match="two names"):
            two_names(wrong)


def test_named_models_are_found_on_their_servers() -> None:
    here, there = Server("http://here:1"), Server("http://there:1")
    found = [
        Choice("base @ here:1", "base", here),
        Choice("food @ here:1", "food", here),
        Choice("base @ there:1", "base", there),
    ]
    assert named_among(["food", "base"], found) == (["food @ here:1", "base @ here:1"], [])
    assert named_among(["base", "base"], found) == (["base @ here:1", "base @ there:1"], [])
    assert named_among(["base @ there:1", "other"], found) == (["base @ there:1"], ["other"])


def test_the_server_tells_its_page_what_to_open_with(capsys: pytest.CaptureFixture[str]) -> None:
    serve = Serve(ui=True, ui_port=7861, ui_compare=True, ui_open=False)
    assert serve.chat_words("nano", ["food", "more"]) == ["--port", "7861", "--compare", "nano", "food", "--no-open"]
    assert Serve(ui=True).chat_words("nano", []) == []
    for wrong in (Serve(ui=True, ui_compare=True), Serve(ui_compare=True, adapter=("food=runs/food",))):
        with pytest.raises(ConfigError, match="--ui-compare goes with"):
            wrong.run()
