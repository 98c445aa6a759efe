"""Runs seen from their folders: listed, shown, compared, and made into pages that need nothing else."""

import json
import re
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="teaching goes through PEFT, which is not installed: it is in the train extra")

from colours import colour_samples, interrupt_at, recipe_of
from tessella import cli
from tessella.errors import ConfigError, DataError
from tessella.exam import exam_of
from tessella.runs.folder import differences, find_runs, read_run
from tessella.runs.page import MOST_POINTS, as_html, clock, number, thinned, write_page
from tessella.train.lock import Lock
from tessella.train.loop import train
from tiny import tiny_folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs on one model: one to its end with scores, one stopped on the way with another rate."""
    home = tmp_path_factory.mktemp("runs")
    folder = tiny_folder(home / "models" / "tiny", "LlamaForCausalLM")
    samples = colour_samples()
    recipe = recipe_of(folder, home / "all" / "one", epochs=4.0, evaluate_every=6, sample_answers=2, score_samples=4)
    train(recipe, samples=samples[:8], held_out=samples[8:], exam=exam_of(recipe))
    other = replace(recipe, output=home / "all" / "deep" / "two", learning_rate=1e-3)
    train(other, samples=samples[:8], held_out=samples[8:], exam=exam_of(other), on_event=interrupt_at(3))
    return home / "all"


def test_runs_are_found_wherever_they_lie_below(home: Path) -> None:
    assert [(run.name, run.state, run.steps, run.total_steps) for run in find_runs(home)] == [
        ("one", "finished", 8, 8),
        ("two", "stopped", 3, 8),
    ]


def test_a_run_without_an_end_is_running_or_killed(home: Path, tmp_path: Path) -> None:
    record = json.loads((home / "one/run.json").read_text(encoding="utf-8"))
    (tmp_path / "run.json").write_text(json.dumps({**record, "state": "running"}), encoding="utf-8")
    assert read_run(tmp_path).state == "killed"
    with Lock(tmp_path):
        assert read_run(tmp_path).state == "running"


def test_two_recipes_differ_in_what_was_told(home: Path) -> None:
    one, two = read_run(home / "one"), read_run(home / "deep/two")
    assert differences(one, two) == [("learning_rate", 0.005, 0.001)]
    assert one.told()["lora_rank"] == 4 and "tower" not in one.told()


def test_the_score_is_what_the_metric_says(home: Path) -> None:
    run = read_run(home / "one")
    told = next(row["answers"] for row in run.rows if row["kind"] == "answers")
    assert [at for at, _ in run.series("score")] == [0, 6, 8]
    assert {row["place"] for row in told} == {"made:8", "made:9"}
    assert all((home / "one" / row["picture"]).is_file() for row in told)


def test_a_page_holds_everything_and_loads_nothing(home: Path) -> None:
    page = write_page(home / "one").read_text(encoding="utf-8")
    for words in ("Before and after", "held-out loss", "learning_rate", "name the photo", "made:8", "torch", "data:image/jpeg"):
        assert words in page
    assert page.count("<svg") >= 4
    addresses = re.findall(r'(?:src|href|url)\s*[=(]\s*"?([^"\s)>]+)', page)
    assert all(address.startswith(("data:", "#")) for address in addresses)


def test_what_a_model_answers_is_no_part_of_the_page(home: Path, tmp_path: Path) -> None:
    for name in ("run.json", "recipe.toml"):
        (tmp_path / name).write_bytes((home / "one" / name).read_bytes())
    row = {"question": "<script>a()</script>", "expected": "<b>x", "answer": "<img src=x onerror=b()>", "place": "p"}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "kind": "answers", "answers": [row]}), encoding="utf-8")
    page = as_html([read_run(tmp_path)])
    assert "<script>" not in page and "<img src=x" not in page and "&lt;b&gt;x" in page


def test_a_comparison_draws_both_into_one_curve(home: Path) -> None:
    page = as_html([read_run(home / "one"), read_run(home / "deep/two")])
    assert "one: loss" in page and "two: loss" in page and "What differs in the recipes" in page


def test_a_long_curve_is_drawn_as_means() -> None:
    points = [(step, float(step)) for step in range(1, 10 * MOST_POINTS + 8)]
    thin = thinned(points)
    assert len(thin) <= MOST_POINTS and thin[-1][0] == points[-1][0]
    assert thin[0][1] == sum(range(1, 12)) / 11


def test_numbers_are_written_for_people() -> None:
    assert [number(value) for value in (12345, 2e-4, True, None, ["a", "b"], [])] == [
        "12,345",
        "0.0002",
        "yes",
        "–",
        "a, b",
        "none",
    ]
    assert [clock(value) for value in (7.9, 83, 3723.4, None)] == ["7 s", "1 min 23 s", "1 h 02 min", "–"]


# ---- the command


def test_the_command_lists_shows_and_compares(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", str(home), "--json", str(tmp_path / "list.json")]) == 0
    assert "stopped" in capsys.readouterr().out
    assert [run["steps"] for run in json.loads((tmp_path / "list.json").read_text())["runs"]] == [8, 3]
    assert cli.main(["runs", str(home / "one")]) == 0
    assert "held-out loss" in capsys.readouterr().out and (home / "one/report.html").is_file()
    words = ["runs", str(home / "one"), str(home / "deep/two"), "--html", str(tmp_path / "c.html")]
    assert cli.main([*words, "--json", str(tmp_path / "two.json")]) == 0
    assert "learning_rate" in capsys.readouterr().out and (tmp_path / "c.html").is_file()
    assert json.loads((tmp_path / "two.json").read_text())["differing"][0]["field"] == "learning_rate"


def test_a_folder_without_runs_and_a_page_of_many_are_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no run"):
        cli.parse(["runs", str(tmp_path)]).run()
    with pytest.raises(ConfigError, match="is a folder of runs"):
        cli.parse(["runs", str(home), "--html", str(tmp_path / "x.html")]).run()


def test_files_that_are_broken_are_named(home: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo', encoding="utf-8")
    assert read_run(tmp_path).series("loss") == [(1, 2.0)]
    (tmp_path / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"run\.json is not JSON"):
        read_run(tmp_path)


# ---- trackers


class StandIn(types.ModuleType):
    """Weights & Biases and SwanLab as far as we use them."""

    def __init__(self, name: str):
        super().__init__(name)
        self.told: list[tuple[str, Any]] = []
        self.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]

    def init(self, **words: Any) -> None:
        self.told.append(("init", words))

    def log(self, values: dict[str, Any], step: int) -> None:
        self.told.append(("log", (step, values)))

    def finish(self) -> None:
        self.told.append(("finish", None))

    def Image(self, path: str, caption: str) -> tuple[str, str]:
        return path, caption


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_trackers_are_told_numbers_and_pictures(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = StandIn(name)
    monkeypatch.setitem(sys.modules, name, stand_in)
    folder = tiny_folder(tmp_path / "tiny", "LlamaForCausalLM")
    samples = colour_samples()
    recipe = recipe_of(folder, tmp_path / "run", max_steps=2, evaluate_every=2, sample_answers=1, trackers=(name,))
    train(recipe, samples=samples[:8], held_out=samples[8:])
    kinds = [kind for kind, _ in stand_in.told]
    assert kinds[0] == "init" and kinds[-1] == "finish"
    assert stand_in.told[0][1]["config"]["learning_rate"] == 5e-3
    logged = [values for kind, values in stand_in.told if kind == "log"]
    assert any("loss" in values for _, values in logged) and any("held_out_loss" in values for _, values in logged)
    path, caption = next(values["answers"][0] for _, values in logged if "answers" in values)
    assert Path(path).is_file() and "expected: red" in caption


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    folder = tiny_folder(tmp_path / "tiny", "LlamaForCausalLM")
    with pytest.raises(ConfigError, match=r"trackers names wandb, which is not installed: pip install wandb"):
        train(recipe_of(folder, tmp_path / "run", trackers=("wandb",)), samples=colour_samples())


def test_tensorboard_shows_the_pictures_that_were_asked_about(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is in the train extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, samples = home.parent / "models" / "tiny", colour_samples()
    recipe = recipe_of(folder, tmp_path, max_steps=1, evaluate_every=1, sample_answers=2, tensorboard=True)
    torch.manual_seed(0)
    train(recipe, samples=samples[:8], held_out=samples[8:])
    seen = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    seen.Reload()
    assert seen.Tags()["images"] == ["answers/0", "answers/1"]
