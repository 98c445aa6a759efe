"""A forecast: the fit of measured passes, the plan behind it, and what it says when a run will not fit."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("peft", reason="teaching goes through PEFT, which is not installed: it is in the train extra")

from tessella.cli import main
from tessella.errors import MemoryError_, TrainingError
from tessella.inspection import eyes
from tessella.train.dataset import read_recipe_data
from tessella.train.forecast import duration, epoch_of, fitted, forecast, measured
from tessella.train.measuring import measure
from tessella.train.recipe import Recipe
from tiny import tiny_folder


def shape(tokens: int, squares: int) -> dict[str, int]:
    return {"tokens": tokens, "squares": squares, "tiles": 0}


def test_measured_passes_are_fitted_without_negative_costs() -> None:
    shapes = [shape(100, 1000), shape(400, 9000), shape(900, 90000)]
    cost = fitted(shapes, [0.01 * s["tokens"] + 1e-6 * s["squares"] + 0.5 for s in shapes])
    assert cost((600, 20000)) == pytest.approx(6.52, rel=1e-6)
    noisy = fitted(shapes, [1.0, 0.9, 0.8])  # more tokens in less time: noise
    assert min(noisy.weights) >= 0
    assert fitted(shapes[:1], [2.0])((200, 1000)) == pytest.approx(4.0)
    assert [duration(s) for s in (5, 95, 7300)] == ["5 s", "1:35 min", "2:02 h"]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    rows = []
    for n in range(12):
        Image.new("RGB", (56 * (1 + n % 3), 56), (20 * n, 90, 40)).save(tmp_path / f"{n}.png")
        turns = [{"from": "human", "value": "What is it? " * (1 + n % 4)}, {"from": "gpt", "value": f"apple {n}"}]
        rows.append(json.dumps({"image": f"{n}.png", "conversations": turns}))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    model = tiny_folder(tmp_path / "tiny", "LlamaForCausalLM")
    return Recipe(
        model=str(model), data=(tmp_path / "rows.jsonl",), held_out=2, samples_per_step=4, tokens_per_pass=160, dtype="float32",
        epochs=2.0, output=tmp_path / "run", device="cpu",
    )  # fmt: skip


def test_the_passes_of_a_run_are_measured_and_a_forecast_is_told(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measure(recipe)  # in this process, which a test need not start anew
    assert len(found.passes) == 3
    assert [one.tokens for one, _ in found.passes] == sorted(one.tokens for one, _ in found.passes)
    assert all(clock.cpu_s > 0 for _, clock in found.passes)
    assert found.tile_bytes == 4 * 4 * 128 and found.row_bytes > 0  # 4 visual tokens of 4 * 32 features, float32
    assert (recipe.output / "adapter").is_dir() and (recipe.output / "metrics.jsonl").is_file()
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    monkeypatch.setattr("tessella.inspection.measured", lambda _: json.loads(json.dumps(asdict(found))))
    assert main(["inspect", "--recipe", str(tmp_path / "recipe.toml"), "--forecast", "--json", str(tmp_path / "out.json")]) == 0
    told = capsys.readouterr().out
    assert "forecast on cpu: 5 steps of" in told
    assert "packing best_fit" in told
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["forecast"]["fits"] and written["forecast"]["steps"] == 5
    assert written["packing"]["passes"] >= 3
    monkeypatch.setattr(
        "tessella.inspection.measured", lambda _: {**json.loads(json.dumps(asdict(found))), "free_bytes": -(10**9)}
    )
    assert main(["inspect", "--recipe", str(tmp_path / "recipe.toml"), "--forecast"]) == 0
    assert "! it will not fit: --" in capsys.readouterr().out


def test_looks_before_the_first_step_and_scored_answers_are_counted(recipe: Recipe) -> None:
    clock = {"wall_s": 1.0, "cpu_s": 1.0}
    nothing = {"wall_s": 0.0, "cpu_s": 0.0}
    found = dict.fromkeys(("start", "build", "tile", "update", "save", "result"), nothing) | {
        "device": "cpu", "passes": [[shape(100, 1000), nothing]], "held_out": [shape(10, 100), nothing], "answer": clock,
        "peaks": [[100, 1000]], "row_bytes": 0, "tile_bytes": 0, "base_bytes": 0, "free_bytes": 10**9,
    }  # fmt: skip
    inputs, _ = eyes(recipe.model, None)
    data = read_recipe_data(recipe, inputs)
    few: dict[str, Any] = {"score_samples": 0, "sample_answers": 1}
    cases: list[tuple[dict[str, Any], int, int]] = [
        ({}, 2, 2), ({"evaluate_every": 2}, 4, 2), ({"evaluate_every": 0}, 1, 2), (few, 2, 1),
    ]  # fmt: skip
    for fields, looks, answers in cases:
        one = replace(recipe, **fields)  # five steps
        will = forecast(one, data, epoch_of(one, data, inputs), inputs, found)
        assert will.parts["held-out"] == pytest.approx(looks * answers)


def test_what_cannot_be_measured_says_why(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended:
        def __init__(self, code: int):
            self.returncode, self.stderr = code, "no such model"

    for code, kind, words in ((2, TrainingError, "no such model"), (-9, MemoryError_, "--max-tiles")):
        monkeypatch.setattr("tessella.train.forecast.subprocess.run", lambda *_, code=code, **__: Ended(code))
        with pytest.raises(kind, match=words):
            measured(recipe)


@pytest.mark.gpu
@pytest.mark.parametrize("tiles", [1, 7, 13])
@pytest.mark.parametrize("way", ["lora", "qlora", "full"])
def test_on_a_gpu_memory_is_foretold_within_5_and_time_within_10_percent(way: str, tiles: int) -> None:
    """Needs the weights of InternVL2-2B in the folder that TESSELLA_2B names; bench/forecast.py prints the same figures."""
    model = os.environ.get("TESSELLA_2B")
    if not model:
        pytest.skip("TESSELLA_2B names no folder with the weights of InternVL2-2B")
    script = Path(__file__).parents[1] / "bench/forecast.py"
    words = [sys.executable, str(script), way, "--model", model, "--tiles", str(tiles)]
    told = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert abs(told["memory_off"]) <= 0.05
    assert abs(told["time_off"]) <= 0.10
