"""A web chat of its own process, the stand-in server that it asks, and Debian's Chromium. Without a browser the tests skip."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_OPEN = build_opener(ProxyHandler({})).open  # this machine is not behind a proxy


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def fetch(url: str) -> Any:
    with _OPEN(url, timeout=5) as answer:
        return json.loads(answer.read())


def wait_for(what: Callable[[], Any], seconds: float = 20.0) -> Any:
    """The first true thing that what gives."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := what():
                return found
        except (OSError, URLError):
            pass
        time.sleep(0.05)
    raise AssertionError(f"nothing in {seconds} s")


@dataclass
class StandIn:
    """The server that is asked; it can be killed and started again on the same port."""

    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.process = subprocess.Popen([sys.executable, str(Path(__file__).with_name("chat_stand_in.py")), str(self.port)])
        wait_for(lambda: fetch(f"{self.url}/v1/models"))

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def seen(self) -> list[dict[str, Any]]:
        return fetch(f"{self.url}/seen")["seen"]

    def left(self) -> list[str]:
        return fetch(f"{self.url}/seen")["left"]


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


@pytest.fixture(scope="session")
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
