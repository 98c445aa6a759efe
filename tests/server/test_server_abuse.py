"""None of abuse.py's cases brings a fault, a hang, a lost place or lasting memory; and none reaches what it aims at."""

import gc
import threading
from collections import Counter
from collections.abc import Iterator

import psutil
import pytest
from abuse import CASES, Case, send
from stand_in import Live, ScriptedEngine, live
from test_server_life import soon

READY = Case("ready", b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", (200,))
MANY = 120  # of those that leave in the middle


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    engine = ScriptedEngine(step_s=0.002)
    with live(engine, image_domains=("pics.example.org",), head_s=2, body_s=0.5) as running:
        yield running
        assert soon(lambda: engine.running == 0)
        assert soon(lambda: running.service.memory.held == 0)


def port_of(server: Live) -> int:
    return int(server.url.rpartition(":")[2])


def test_there_are_more_than_enough_cases_and_no_two_alike() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 60


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_abuse_is_answered_with_a_refusal_and_the_server_lives_on(server: Live, case: Case) -> None:
    status = send(port_of(server), case)
    assert status in case.allowed, status
    assert send(port_of(server), READY) == 200


def test_hundreds_who_leave_in_the_middle_leave_nothing_behind(server: Live) -> None:
    leaving = [case for case in CASES if case.name.startswith("leaves")]
    port, statuses = port_of(server), Counter[int]()

    def leave(number: int) -> None:
        for i in range(number, MANY, 8):
            statuses[send(port, leaving[i % len(leaving)])] += 1

    before = psutil.Process().memory_info().rss
    threads = [threading.Thread(target=leave, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert set(statuses) <= {0, 200}
    assert soon(lambda: server.engine.running == 0)
    assert soon(lambda: server.service.memory.held == 0)
    gc.collect()
    assert soon(lambda: psutil.Process().memory_info().rss - before < 200 * 2**20)  # given back a second after the last work
    assert send(port_of(server), READY) == 200
