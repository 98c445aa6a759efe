"""bench/ runs: on a tiny model, where transformers' own generate must give the engine's ids."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tiny import tiny_folder

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


def test_both_sides_are_measured_and_give_the_same_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: it is in the train extra")
    from runpy import run_path

    bench = run_path(str(BENCH / "engine.py"))
    folder = tiny_folder(tmp_path / "model", "Qwen2ForCausalLM")
    out = tmp_path / "out.json"
    bench["main"](bench["Options"](str(folder), streams=4, tokens=6, device="cpu", dtype="float32", rounds=1, json=out))
    told = json.loads(out.read_text(encoding="utf-8"))
    assert told["equal_answers"] == 4 and told["engine_tokens_s"]["wall"] > 0 and told["where"]["hardware"]
    assert "4 of 4 answers equal" in capsys.readouterr().out


def test_the_work_for_a_gpu_runs_on_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command, ahead of its ids as on a GPU: every bar has a row, a picture's second question finds its first."""
    from shapes import Bench, Options, main

    out = tmp_path / "shapes.json"
    few = {"text_requests": 2, "one_tile_requests": 1, "seven_tile_requests": 1, "answer_tokens": 3, "rounds": 1}
    options = Options(device="cpu", tiny=True, run_ahead=True, profile=True, json=out, **few)
    main(options)
    told = json.loads(out.read_text(encoding="utf-8"))
    assert sorted(row["bar"] for row in told["rows"] if row["bar"]) == [15, 30, 80, 80, 150, 300, 700]
    assert all(row["number"] > 0 for row in told["rows"]) and len(told["profiles"]) == 4
    assert all("aten::" in table for table in told["profiles"].values())
    printed = capsys.readouterr().out
    assert "| bar | reached |" in printed and "second question about it" in printed
    assert {len(prompt) for prompt in Bench(options).text(3)} == {71}


class Peer(BaseHTTPRequestHandler):
    """Another engine's server: one piece of text, then what it took."""

    asked: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        self.tell(json.dumps({"data": [{"id": "theirs"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        pieces = [{"choices": [{"delta": {"content": "a"}}]}, {"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}]
        self.tell("".join(f"data: {json.dumps(piece)}\n\n" for piece in pieces) + "data: [DONE]\n\n")

    def tell(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_another_engines_server_is_asked_the_same_work() -> None:
    pytest.importorskip("httpx2", reason="httpx2 is not installed: it is in the serve extra")
    from shapes import Options, peer_rows

    with ThreadingHTTPServer(("127.0.0.1", 0), Peer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        few = Options(text_requests=2, one_tile_requests=1, seven_tile_requests=1, answer_tokens=3, rounds=1)
        rows = peer_rows("theirs", f"http://127.0.0.1:{server.server_address[1]}", few)
        server.shutdown()
    assert [row.work.split(": ")[1].split()[0] for row in rows] == ["one", "first", "2", "1", "1"]
    assert all(row.number > 0 and row.bar is None for row in rows)
    assert {body["model"] for body in Peer.asked} == {"theirs"} and all(body["ignore_eos"] for body in Peer.asked)
    shown = [body["messages"][0]["content"][0] for body in Peer.asked if not isinstance(body["messages"][0]["content"], str)]
    assert len(shown) == 4 and all(one["image_url"]["url"].startswith("data:image/png;base64,") for one in shown)


def test_the_hosts_share_of_a_step_is_measured() -> None:
    from host import Options, measured

    cost = measured(Options(rows=4, steps=3))
    assert cost.submit > 0 and cost.step > 0
