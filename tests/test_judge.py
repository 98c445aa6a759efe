"""The independent judge of drawn foods: kept in a file, read back the same, told apart from other files, counted."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tessella.cli import main
from tessella.errors import DataError
from tessella.evaluate.boxes import SceneAnswer, score_answers
from tessella.evaluate.judge import as_seen, judge_at, view
from tessella.foods import STYLES, foods
from tessella.scenes.compose import Kit
from tessella.scenes.requests import Request


def test_a_judge_is_taught_once_and_read_back_the_same(tmp_path: Path) -> None:
    told: list[str] = []
    path = tmp_path / "judge.safetensors"
    one = judge_at(path, told.append, steps=2)
    two = judge_at(path, told.append, steps=2)
    assert len(told) == 1 and (one.right, one.views) == (two.right, two.views) and 0 <= one.right <= one.views == 968
    picture = view(foods()[3], STYLES[0], random.Random(1))
    with torch.inference_mode():
        torch.testing.assert_close(one.judge(as_seen(picture)[None]), two.judge(as_seen(picture)[None]))
    assert one.name(picture) in foods()


def test_a_file_that_holds_no_judge_is_told(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    path.write_bytes(b"no judge at all")
    with pytest.raises(DataError, match="holds no judge of drawn foods"):
        judge_at(path, print)


def test_a_judge_without_drawing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "tessella-nano", "--scenes", "3", "--judge", str(tmp_path / "j")]) == 2
    assert "say --scene-kinds draw" in " ".join(capsys.readouterr().err.split())
    assert main(["evaluate", "tessella-nano", "--judge", str(tmp_path / "j")]) == 2
    assert not (tmp_path / "j").exists()


def test_what_the_judge_says_is_counted_where_it_was_asked() -> None:
    pytest.importorskip("pycocotools")
    asked = Request(Kit(STYLES[:1]), 0, ("draw",)).make()
    label = asked.truths[0].label
    answer = SceneAnswer("", asked, label, ())
    judged = [replace(answer, judged=name) for name in (label, "something else", "")]
    score = score_answers([*judged, answer])
    assert (score.judged.right, score.judged.total, score.drawn.total) == (1, 3, 4)
