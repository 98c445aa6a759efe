"""bench/ runs: on a tiny model, where transformers' own generate must give the engine's ids."""

import json
from pathlib import Path

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
    assert all(row["number"] > 0 for row in told["rows"]) and len(told["profiles"]) == 3
    assert all("aten::" in table for table in told["profiles"].values())
    printed = capsys.readouterr().out
    assert "| bar | reached |" in printed and "second question about it" in printed
    assert {len(prompt) for prompt in Bench(options).text(3)} == {71}


def test_the_hosts_share_of_a_step_is_measured() -> None:
    from host import Options, measured

    cost = measured(Options(rows=4, steps=3))
    assert cost.submit > 0 and cost.step > 0
