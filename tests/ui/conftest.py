"""A web chat of its own process, the stand-in server that it asks, and Debian's Chromium. Without a browser the tests skip."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from chat_processes import StandIn, free_port

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="session")
def stand_in() -> Iterator[StandIn]:
    server = StandIn()
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def serve_chat() -> Iterator[Callable[..., str]]:
    """Starts `tessella ui` with flags, gives the address that it prints."""
    processes = []

    def start(*flags: str, host: str = "127.0.0.1") -> str:
        command = [sys.executable, "-m", "tessella.cli", "ui", "--port", str(free_port()), "--host", host, "--no-open", *flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        processes.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("web chat on "), line
        return line.split()[3].rstrip(",")

    yield start
    for process in processes:
        process.terminate()
        assert process.wait(20) == 0


# A module's, not the session's: while it lives, its event loop runs in this thread, and no other test could run one.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="THE WEB CHAT IS NOT TESTED: playwright is not installed")
    pytest.importorskip("gradio", reason="THE WEB CHAT IS NOT TESTED: gradio is not installed; it is in the ui extra")
    if CHROMIUM is None:
        pytest.skip("THE WEB CHAT IS NOT TESTED: no chromium on this machine; apt-get install chromium")
    flags = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def picture(tmp_path: Path) -> Callable[[str], Path]:
    """A picture of one colour."""

    def make(colour: str) -> Path:
        path = tmp_path / f"{colour.strip('#')}.png"
        Image.new("RGB", (64, 48), colour).save(path)
        return path

    return make
