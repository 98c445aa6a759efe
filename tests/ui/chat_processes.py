"""The stand-in server as a process that can be killed and started again, and waiting for it."""

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_OPEN = build_opener(ProxyHandler({})).open  # this machine is not behind a proxy


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def fetch(url: str) -> Any:
    with _OPEN(url, timeout=5) as answer:
        return json.loads(answer.read())


def wait_for(what: Callable[[], Any], seconds: float = 60.0) -> Any:
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
