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


def test_the_work_for_a_gpu_runs_on_a_tiny_model() -> None:
    from shapes import Bench, Options

    bench = Bench(Options(device="cpu", tiny=True, rounds=1, answer_tokens=3))
    assert {len(prompt) for prompt in bench.text(3)} == {71}
    rows = bench.batch("2 requests", bench.text(2))
    assert [row.unit for row in rows] == ["requests/s", "tokens/s", "ms"] and all(row.number > 0 for row in rows)
