"""A web chat of its own process, the stand-in server that it asks, and Debian's Chromium."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from chat_processes import CHROMIUM, StandIn, free_port


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
    from playwright.sync_api import sync_playwright  # the module that asks for it has looked whether it is there

    flags = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
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
