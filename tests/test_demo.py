"""The demo tells its whole story on any model, goes on where it was stopped, and clears away only what a demo made."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

pytest.importorskip("peft", reason="teaching goes through PEFT, which is not installed: it is in the train extra")

from tessella import cli, demo
from tessella.checkpoint.folder import changed_files
from tessella.demo import MARKER, PARTS, QUESTIONS, Plan, prepare, questions, row, run, write_rows
from tessella.errors import ConfigError, DataError
from tessella.foods import STYLES, foods
from tessella.train.dataset import read_dataset
from tiny import tiny_folder

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model") / "tiny", "LlamaForCausalLM")


def test_the_whole_story_with_a_tiny_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, result = tmp_path / "demo", tmp_path / "demo.json"
    words = ["demo", "--model", str(folder), "--foods", "4", "--epochs", "2", "--device", "cpu", "--no-open"]
    words += ["--projector-warmup-steps", "3"]
    assert cli.main([*words, "--output", str(output), "--json", str(result)]) == 0
    found = json.loads(result.read_text(encoding="utf-8"))
    assert found["questions"] == 8 and found["foods"] == 4
    for name in ("before", "after"):
        low, high = found["intervals"][name]
        assert 0 <= low <= found[name] <= high <= 1
        assert found[name] == pytest.approx(sum(found["languages"][language][name] for language in QUESTIONS) / 2)
    assert 0 < found["largest_logit_difference"] < 1
    assert list(found["steps"]) == ["ask", "before", "teach", "convert", "after", "ask again"]
    assert found["seconds"] == pytest.approx(sum(found["steps"].values()), abs=0.5)
    assert sorted(path.name for path in output.iterdir()) == sorted(PARTS)
    assert changed_files(output / "model") == []
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "葡萄" in page and "<svg" in page
    said = capsys.readouterr().out
    assert "report.html" in said and "--adapter foods=" in said  # the chat's command: nobody sits before a test
    # done again, it is done anew
    assert prepare(Plan(model=str(folder), output=output), QUIET) is False
    assert [path.name for path in output.iterdir()] == [MARKER]


def test_a_stopped_demo_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(model=str(folder), foods=2, epochs=1, output=tmp_path / "demo", device="cpu", open=False)

    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "convert", stop)
        with pytest.raises(KeyboardInterrupt):
            run(plan, QUIET)
    metrics = plan.output / "training" / "metrics.jsonl"
    assert metrics.is_file() and (plan.output / "training" / "adapter").is_dir()
    adapter = (plan.output / "training" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert run(plan, QUIET).after is not None
    assert (plan.output / "training" / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert "resumed" in metrics.read_text(encoding="utf-8")


def test_only_a_stopped_demo_of_the_same_plan_is_gone_on_with(tmp_path: Path) -> None:
    plan = Plan(output=tmp_path / "demo")
    assert prepare(plan, QUIET) is False
    assert prepare(plan, QUIET) is True
    assert prepare(replace(plan, fresh=True), QUIET) is False
    assert prepare(replace(plan, seed=1), QUIET) is False
    (plan.output / MARKER).write_text("damaged", encoding="utf-8")
    assert prepare(plan, QUIET) is False


def test_what_a_demo_did_not_make_stays(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "answers").mkdir()
    (theirs / "answers" / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(DataError, match="no demo made it"):
        prepare(Plan(output=theirs), QUIET)
    assert (theirs / "answers" / "mine.txt").read_text(encoding="utf-8") == "mine"
    plan = Plan(output=tmp_path / "ours")
    prepare(plan, QUIET)
    (plan.output / "note.txt").write_text("mine", encoding="utf-8")
    prepare(replace(plan, fresh=True), QUIET)
    assert (plan.output / "note.txt").is_file()
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="is a file"):
        prepare(Plan(output=file), QUIET)


def test_nothing_that_is_tested_is_taught(tmp_path: Path) -> None:
    plan = Plan(output=tmp_path)
    write_rows(plan)
    taught, ledger = read_dataset(tmp_path / "taught.jsonl")
    assert len(taught) == 3 * len(foods()) and not ledger.skipped
    shown = {Path(str(picture.source)).resolve() for sample in taught for picture in sample.pictures}
    task = questions(plan)
    assert len(task.items) == 2 * len(foods())
    assert not any(Path(str(item.pictures[0].source)).resolve() in shown for item in task.items)
    # yet asked as it was taught, each language first on about half of the pictures
    first = [sample.messages[0].text for sample in taught]
    assert set(first) == {item.messages[0].text for item in task.items}
    assert abs(sum("图" in text for text in first) - len(first) / 2) <= 1
    assert {sample.messages[1].text for sample in taught} == {item.answers[0] for item in task.items}


def test_both_languages_of_a_food_are_in_one_row() -> None:
    food = foods()[0]
    even, odd = (row(food, STYLES[0], number)["conversations"] for number in (0, 1))
    assert [turn["value"] for turn in even[1::2]] == [food.english, food.chinese]
    assert [turn["value"] for turn in odd[1::2]] == [food.chinese, food.english]
    assert all(turns[0]["value"].startswith("<image>\n") and "<image>" not in turns[2]["value"] for turns in (even, odd))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"test_style": "crayon"}, "crayon"),
        ({"styles": ("noto", "crayon")}, "crayon"),
        ({"styles": ("noto",), "test_style": "noto"}, "never saw"),
        ({"foods": 1}, "from 2 to"),
        ({"foods": 10_000}, "from 2 to"),
    ],
)
def test_a_plan_that_cannot_be_is_told(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Plan(**wrong)  # type: ignore[arg-type]
