"""Time: a client that goes away, that is slow, that waits too long; a server that is told to stop."""

import json
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress

import httpx2
import pytest
from stand_in import NAME, Live, ScriptedEngine, folder, live

from tessella.cli import main
from tessella.server.connection import Connection

BODY = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 400}


def soon(what: Callable[[], bool], within_s: float = 20.0) -> bool:
    """On a quiet machine all that is waited for here comes within a second; a busy one is no fault of the server."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if what():
            return True
        time.sleep(0.01)
    return False


def raw(server: Live, data: bytes = b"") -> socket.socket:
    port = int(server.url.rpartition(":")[2])
    made = socket.create_connection(("127.0.0.1", port), timeout=10)
    made.sendall(data)
    return made


def head(length: int) -> bytes:
    lines = (
        "POST /v1/chat/completions HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {length}",
    )
    return "\r\n".join((*lines, "", "")).encode()


def test_what_is_written_goes_out_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Connection] = []
    begin = Connection.connection_made
    monkeypatch.setattr(Connection, "connection_made", lambda self, transport: (made.append(self), begin(self, transport))[1])
    with live(ScriptedEngine()) as server, httpx2.Client(base_url=server.url) as client:
        client.get("/health")
        (connection,) = made
        taken = connection.transport.get_extra_info("socket")
        assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)  # else 40 ms between two pieces


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_is_noticed_within_a_second(stream: bool) -> None:
    with live(ScriptedEngine(step_s=0.05)) as server, httpx2.Client(base_url=server.url) as client:
        if stream:
            with client.stream("POST", "/v1/chat/completions", json={**BODY, "stream": True}) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx2.ReadTimeout):
                client.post("/v1/chat/completions", json=BODY, timeout=0.2)
        assert soon(lambda: server.engine.cancelled == 1)
        assert soon(lambda: server.service.memory.held == 0)


def test_all_answers_to_a_request_are_cancelled_when_one_is_refused() -> None:
    with live(ScriptedEngine(step_s=0.05, max_waiting=2)) as server:
        assert httpx2.post(f"{server.url}/v1/chat/completions", json={**BODY, "n": 3}).status_code == 429
        assert soon(lambda: server.engine.cancelled == 2 and server.engine.running == 0)


def test_an_answer_that_takes_too_long_is_ended_and_says_so() -> None:
    with live(ScriptedEngine(step_s=0.05), answer_s=0.3) as server, httpx2.Client(base_url=server.url) as client:
        answer = client.post("/v1/chat/completions", json=BODY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (408, "time_limit")
        text = client.post("/v1/chat/completions", json={**BODY, "stream": True}).text
        assert '"code":"time_limit"' in text.splitlines()[-2]
        assert soon(lambda: server.engine.cancelled == 2)


def test_a_head_a_body_and_a_silence_that_never_end_are_ended() -> None:
    with live(head_s=0.3, body_s=0.3) as server:
        for data in (b"", b"GET / HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: "):
            with raw(server, data) as slow:
                assert slow.recv(1000).startswith(b"HTTP/1.1 408")
        with raw(server, head(100) + b'{"model"') as slow:
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")
        with raw(server, head(10**9)) as huge:
            assert huge.recv(1000).startswith(b"HTTP/1.1 413")
        assert httpx2.get(f"{server.url}/health").status_code == 200


def test_a_head_that_trickles_does_not_buy_time() -> None:
    with live(head_s=0.5) as server, raw(server, b"GET /health HTTP/1.1\r\n") as slow:
        start = time.monotonic()
        with pytest.raises(OSError):  # broken pipe or reset, as the system likes
            while time.monotonic() - start < 5:
                slow.sendall(b"X-A: b\r\n")
                time.sleep(0.05)
        assert time.monotonic() - start < 2


def test_a_client_that_does_not_read_its_answer_is_left() -> None:
    with live(ScriptedEngine(), write_s=0.3, answer_s=30) as server:
        body = json.dumps({**BODY, "max_tokens": 3500, "stream": True, "logprobs": True, "top_logprobs": 20}).encode()
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        deaf.sendall(head(len(body)) + body)
        assert soon(lambda: len(server.server.server_state.connections) == 1)
        assert soon(lambda: not server.server.server_state.connections)
        deaf.close()


def test_more_connections_than_allowed_are_closed_at_once() -> None:
    with live(connections=3, head_s=5) as server:
        held = [raw(server) for _ in range(3)]
        with raw(server) as one_more, suppress(ConnectionResetError):
            assert one_more.recv(10) == b""
        for one in held:
            one.close()
        assert soon(lambda: not server.server.server_state.connections)
        assert httpx2.get(f"{server.url}/health").status_code == 200


def test_bodies_that_fill_the_memory_are_refused_and_then_forgotten() -> None:
    with live(memory_bytes=1000) as server:
        with raw(server, head(3000) + b"x" * 900):
            assert soon(lambda: server.service.memory.held == 900)
            answer = httpx2.post(f"{server.url}/v1/chat/completions", json=BODY | {"stop": "x" * 150})
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
        assert soon(lambda: server.service.memory.held == 0)
        assert httpx2.post(f"{server.url}/v1/chat/completions", json=BODY).status_code == 200


def test_a_dead_engine_makes_the_server_unwell_and_unready() -> None:
    with live() as server:
        server.engine.alive = False
        for path in ("/health", "/ready"):
            assert httpx2.get(f"{server.url}{path}").status_code == 503
        answer = httpx2.post(f"{server.url}/v1/chat/completions", json=BODY)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


def test_a_failed_engine_ends_the_server_so_that_its_keeper_can_start_another() -> None:
    with live() as server:
        server.engine.failure = "a test says so"
        assert soon(lambda: server.server.should_exit)
        assert server.server.why == "engine"


def test_what_runs_too_long_after_sigterm_is_broken_off() -> None:
    wish = {**BODY, "stream": True}
    with live(ScriptedEngine(step_s=0.05), drain_s=0.3) as server:
        address = f"{server.url}/v1/chat/completions"
        with httpx2.stream("POST", address, json=wish) as answer:
            next(answer.iter_lines())
            server.server.handle_exit(signal.SIGTERM, None)
            assert soon(lambda: server.engine.cancelled == 1)


def test_a_body_that_is_not_whole_when_the_drain_ends_is_refused_in_openais_form() -> None:
    with live(drain_s=0.3) as server, raw(server, head(100) + b'{"model"') as slow:
        assert soon(lambda: bool(server.server.server_state.tasks))
        server.server.handle_exit(signal.SIGTERM, None)
        slow.settimeout(30)
        answer = b"".join(iter(lambda: slow.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 503") and json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "draining"


def test_a_taken_port_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", str(folder()), "--port", str(taken.getsockname()[1])]) == 2
    assert "another --port" in capsys.readouterr().err
