"""Freed memory goes back: when there is nothing to do, now and then under load, and really to the system."""

import ctypes
import subprocess
import sys
from typing import Any

import httpx2
import pytest
from stand_in import live
from test_server_life import soon

from tessella.server import run
from tessella.server.memory import EVERY_S, IDLE_S, Tidy

# Blocks that glibc keeps in its heap, with one that stays above each: so nothing goes back by itself.
HOLES = """
import psutil
from tessella.server.memory import give_back
holes = [(bytearray(60_000), bytearray(600)) for _ in range(2000)]
stay = [small for _, small in holes]
del holes
before = psutil.Process().memory_info().rss
give_back()
print(before - psutil.Process().memory_info().rss)
"""


def test_it_is_due_after_work_once_and_under_load_now_and_then() -> None:
    now = [0.0]
    tidy = Tidy(lambda: now[0])

    def due(at_s: float, at_work: bool) -> bool:
        now[0] = at_s
        return tidy.due(at_work)

    assert not due(100, False)  # nothing was done yet
    assert due(101, True)  # the last time is long ago
    assert not due(101.5, False)  # a pause is not the end
    assert not due(102, True)
    assert not due(102 + IDLE_S / 2, False)
    assert due(102 + IDLE_S, False)
    assert not due(110, False)
    dues = [due(200 + 0.1 * tick, True) for tick in range(int(10 * EVERY_S) + 20)]
    assert dues.count(True) == 2 and dues[0]


def test_what_is_given_back_is_given_to_the_system() -> None:
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("this C library has no malloc_trim")
    told = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True).stdout
    assert int(told) > 60 * 2**20  # of 120 MB


def test_a_server_tidies_up_after_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[int] = []
    monkeypatch.setattr(run, "give_back", lambda: times.append(1))
    body: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    with live() as server:
        assert httpx2.post(f"{server.url}/v1/chat/completions", json=body).status_code == 200
        assert soon(lambda: bool(times))
