"""A server started and watched from outside, as its keepers would: its questions, its answers, its memory. Used by load.py.

In: words of `tessella serve`.  Out: a Server that answers, and what was said of each request.
"""

import base64
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import psutil

from tessella.foods import foods, picture

TEXTS = ("Name three fruits.", "What is the capital of France?", "Write a short poem about rice.", "How do I boil an egg?")


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    url: str
    model: str

    def resident_mib(self) -> float:
        return psutil.Process(self.process.pid).memory_info().rss / 2**20

    def gauges(self) -> dict[str, float]:
        """The plain lines of /metrics."""
        lines = httpx2.get(f"{self.url}/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#") and "{" not in line)
        return {name: float(value) for name, value in pairs}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def start(model: str, *words: str, port: int | None = None) -> tuple[subprocess.Popen[bytes], str]:
    """A server process, and its address; it may not be ready yet."""
    port = port or free_port()
    command = [sys.executable, "-m", "tessella.cli", "serve", model, "--port", str(port), *words]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL), f"http://127.0.0.1:{port}"


def wait_until_ready(process: subprocess.Popen[bytes], url: str, within_s: float = 120) -> float:
    """Seconds until /ready said yes. Raises RuntimeError when it never does."""
    begun = time.monotonic()
    while time.monotonic() - begun < within_s:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode} before it was ready")
        try:
            if httpx2.get(f"{url}/ready", timeout=5).status_code == 200:
                return time.monotonic() - begun
        except httpx2.TransportError:
            pass  # it does not listen yet
        time.sleep(0.05)
    raise RuntimeError(f"the server was not ready within {within_s:g} s")


@contextmanager
def serving(model: str, *words: str) -> Iterator[Server]:
    process, url = start(model, *words)
    try:
        wait_until_ready(process, url)
        name = httpx2.get(f"{url}/v1/models").json()["data"][0]["id"]
        yield Server(process, url, name)
    finally:
        process.terminate()
        process.wait(60)


@dataclass
class Asked:
    """One request as its client saw it. error: None when the answer was whole."""

    begun: float
    seconds: float
    first_token_s: float | None
    tokens: int
    error: str | None


def question(server: Server, number: int, max_tokens: int, pictures_every: int = 2) -> dict[str, Any]:
    """Mixed text and pictures, no two quite alike: a number in the text keeps answers from coming out of the cache alone."""
    text = f"({number}) {TEXTS[number % len(TEXTS)]}"
    content: Any = text
    if pictures_every and number % pictures_every == 0:
        food = foods()[number // pictures_every % len(foods())]
        data = base64.b64encode(picture(food, "twemoji").read_bytes()).decode()
        shown = {"type": "image_url", "image_url": {"url": f"data:image/webp;base64,{data}"}}
        content = [shown, {"type": "text", "text": f"({number}) What food is in this picture?"}]
    messages = [{"role": "user", "content": content}]
    options = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0.7, "seed": number}
    return {"model": server.model, "messages": messages, "max_tokens": max_tokens, **options}


def ask(client: httpx2.Client, body: dict[str, Any]) -> Asked:
    """Streams one answer to its end, and checks that it has one."""
    begun = time.monotonic()
    first, tokens, finish, done, error = None, 0, None, False, None
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                error = f"status {answer.status_code}"
            for line in answer.iter_lines():
                done = done or line == "data: [DONE]"
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    error = chunk["error"]["message"]
                elif chunk["usage"]:
                    tokens = chunk["usage"]["completion_tokens"]
                else:
                    choice = chunk["choices"][0]
                    finish = finish or choice["finish_reason"]
                    first = first or (time.monotonic() - begun if choice["delta"].get("content") else None)
    except httpx2.HTTPError as broken:
        error = f"{type(broken).__name__}: {broken}"
    if error is None and (not done or finish not in ("stop", "length")):
        error = "the answer was not whole"
    return Asked(begun, time.monotonic() - begun, first, tokens, error)


class Askers:
    """Threads that ask one question after the other; rate_hz: questions a second of all of them, None as fast as they come."""

    def __init__(self, server: Server, count: int, max_tokens: int, rate_hz: float | None, first_number: int = 0):
        self.asked: list[Asked] = []
        self._server, self._max_tokens, self._rate_hz = server, max_tokens, rate_hz
        self._number, self._begun = first_number, time.monotonic()
        self._first = first_number
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        with httpx2.Client(base_url=self._server.url, timeout=300) as client:
            while not self._stop.is_set():
                with self._lock:
                    number, self._number = self._number, self._number + 1
                due = self._begun + (number - self._first) / self._rate_hz if self._rate_hz else 0.0
                if self._stop.wait(max(0.0, due - time.monotonic())):
                    return
                asked = ask(client, question(self._server, number, self._max_tokens))
                with self._lock:
                    self.asked.append(asked)

    def stop(self) -> list[Asked]:
        """Waits for what is under way."""
        self._stop.set()
        for thread in self._threads:
            thread.join(300)
        return self.asked


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def slope_per_hour(points: list[tuple[float, float]]) -> float:
    """Least squares over (seconds, value)."""
    count = len(points)
    mean_x = sum(x for x, _ in points) / count
    mean_y = sum(y for _, y in points) / count
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return 3600 * sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
