"""The commands of the README work together: teach, convert, score what was held out, talk."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tessella import cli
from tessella.errors import DataError
from tessella.scoring import Questions
from tessella.train.recipe import load_recipe
from tiny import tiny_folder


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, photos of two classes, a run taught on them, and its conversion."""
    pytest.importorskip("peft", reason="teaching goes through PEFT, which is not installed: it is in the train extra")
    home = tmp_path_factory.mktemp("story")
    model = tiny_folder(home / "base", "InternLM2ForCausalLM")
    for name, colour in (("tomato", "red"), ("lime", "green")):
        (home / "photos" / name).mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (60 + number, 60), colour).save(home / "photos" / name / f"{number}.png")
    taught = ["--model", str(model), "--data", str(home / "photos"), "--output", str(home / "run"), "--held-out", "0.2"]
    speed = ["--epochs", "2", "--samples-per-step", "4", "--no-tensorboard", "--device", "cpu", "--lora-dropout", "0"]
    assert cli.main(["finetune", *taught, *speed, "--json", str(home / "finetune.json")]) == 0
    assert (
        cli.main(["convert", str(home / "run"), str(home / "mine"), "--to", "official", "--json", str(home / "convert.json")])
        == 0
    )
    return home


def test_the_run_leaves_its_recipe_and_its_result(story: Path) -> None:
    result = json.loads((story / "finetune.json").read_text(encoding="utf-8"))
    assert result["command"] == "finetune" and result["finished"] and result["steps"] == 4
    assert load_recipe(story / "run" / "recipe.toml").held_out == 0.2


def test_converting_proves_itself(story: Path) -> None:
    result = json.loads((story / "convert.json").read_text(encoding="utf-8"))
    assert result["proof"]["holds"] and result["largest_logit_difference"] == result["proof"]["logits"]["largest_difference"]


def test_exactly_what_the_run_held_out_is_scored(story: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(story / "base"), str(story / "mine"), "--recipe", str(story / "run" / "recipe.toml")]
    out = ["--output", str(story / "scores"), "--html", str(story / "report.html"), "--json", str(story / "scores.json")]
    assert cli.main([*words, *out, "--device", "cpu"]) == 0
    result = json.loads((story / "scores.json").read_text(encoding="utf-8"))
    assert (
        result["task"] == "run"
        and result["items"] == 2
        and [row["model"] for row in result["rows"]] == [str(story / "base"), str(story / "mine")]
    )
    assert "95 % interval" in capsys.readouterr().out
    assert "data:image" in (story / "report.html").read_text(encoding="utf-8")


def test_an_adapter_is_talked_to_as_the_model_that_it_makes(story: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads((story / "finetune.json").read_text(encoding="utf-8"))
    answers = []
    for model in (result["adapter"], str(story / "run"), str(story / "mine")):
        assert cli.main(["chat", model, "what is it?", "--max-tokens", "8", "--dtype", "float32", "--device", "cpu"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] == answers[2] != "\n"


@pytest.mark.parametrize(("held_out", "expected"), [(None, 10), (0.2, 2), (4, 4)])
def test_a_dataset_is_scored_whole_or_in_its_held_out_part(held_out: float | None, expected: int, story: Path) -> None:
    (task,) = Questions(data=(story / "photos",), held_out=held_out).tasks()
    assert len(task.items) == expected


def test_samples_that_cannot_be_asked_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"conversations": [{"from": "human", "value": "What colour?"}, {"from": "gpt", "value": "red"}]}
    path = tmp_path / "said.jsonl"
    path.write_text(30 * (json.dumps(good) + "\n") + '{"image": oops\n', encoding="utf-8")
    (task,) = Questions(data=(path,)).tasks()
    assert len(task.items) == 30
    assert "said.jsonl:31: line 31, column 11" in capsys.readouterr().err


def test_choices_may_be_shown_to_be_scored_by_letter(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (60, 60), "red").save(tmp_path / "pictures" / "1.jpg")
    options = ["川菜", "东北菜", "粤菜", "鲁菜"]
    row = {
        "question": "哪个地区的？",
        "choices": options,
        "answer": "1",
        "food_meta": {"food_name": "锅包肉", "food_file": "1.jpg"},
    }
    (tmp_path / "sivqa.json").write_text(json.dumps([row]), encoding="utf-8")
    asked = Questions(data=(tmp_path / "sivqa.json",), image_root=tmp_path / "pictures", choices="shown", metric="choice")
    (task,) = asked.tasks()
    assert task.items[0].answers == ("B",) and "B. 东北菜" in task.items[0].question


def test_questions_are_told_from_conversations(tmp_path: Path) -> None:
    Image.new("RGB", (60, 60), "red").save(tmp_path / "a.png")
    asked = {"question": "What colour?", "image": "a.png", "answers": ["red"]}
    said = {"image": "a.png", "conversations": [{"from": "human", "value": "What colour?"}, {"from": "gpt", "value": "red"}]}
    items = []
    for name, row in (("asked", asked), ("said", said)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        (task,) = Questions(data=(path,)).tasks()
        items.append((task.items[0].messages, task.items[0].answers))
    assert items[0] == items[1]


def test_each_file_of_skills_is_a_task_and_any_of_its_answers_counts(tmp_path: Path) -> None:
    """Rows as recipes/nano/make_data.py writes them."""
    folder = tmp_path / "skills"
    folder.mkdir()
    Image.new("RGB", (60, 60), "red").save(folder / "a.png")
    for name in ("naming", "colours"):
        turns = [{"from": "human", "value": f"<image>\n{name}?"}, {"from": "gpt", "value": "jet"}]
        row = {"id": "0", "kind": name, "image": "a.png", "conversations": turns, "answers": ["jet", "plane"]}
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    tasks = Questions(data=(tmp_path,), skills=True).tasks()
    assert [task.name for task in tasks] == ["colours", "naming"]
    assert tasks[1].items[0].answers == ("jet", "plane") and tasks[1].items[0].label == "jet"
    with pytest.raises(DataError, match="make_data"):
        Questions(data=(tmp_path / "nothing",), skills=True).tasks()


@pytest.mark.parametrize("answers", ["red", [], [1], ["red", " "]])
def test_broken_answers_are_told_with_their_line(answers: object, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "red"}]
    path = tmp_path / "said.jsonl"
    path.write_text("\n" + json.dumps({"conversations": turns, "answers": answers}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"said\.jsonl:2"):
        Questions(data=(path,)).tasks()


def test_no_questions_are_told() -> None:
    with pytest.raises(DataError, match="--data"):
        Questions().tasks()
