"""A file appears whole or not at all, also on a disk that is full."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tessella.errors import TrainingError, WriteError
from tessella.evaluate.answers import Answer, AnswerFile
from tessella.files import write_whole
from tessella.train.log import Log
from tessella.train.recipe import Recipe
from tessella.train.trackers import open_trackers

KIB = 1024


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 4 KiB: to a writer that is a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * KIB, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_is_written_with_the_folders_on_its_way(tmp_path: Path) -> None:
    write_whole(tmp_path / "a" / "b.txt", "麻婆豆腐")
    write_whole(tmp_path / "a" / "b.txt", b"new")
    assert (tmp_path / "a" / "b.txt").read_bytes() == b"new"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.txt"]


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_whole(tmp_path / "result.json", "old")
    with pytest.raises(WriteError, match=r"result\.json cannot be written \(File too large\); make room"):
        write_whole(tmp_path / "result.json", "x" * 8 * KIB)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"result.json": "old"}


def test_a_place_that_takes_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "taken", tmp_path / "file" / "below"):
        with pytest.raises(WriteError, match=path.name):
            write_whole(path, "x")


@pytest.mark.usefixtures("small_files")
def test_answers_that_were_kept_outlive_a_full_disk(tmp_path: Path) -> None:
    header = {"model": "m"}
    kept = AnswerFile(tmp_path / "a.jsonl", header)
    kept.add([Answer("1", "yes")])
    with pytest.raises(WriteError, match=r"a\.jsonl"):
        kept.add([Answer("2", "y" * 8 * KIB)])
    again = AnswerFile(tmp_path / "a.jsonl", header)
    assert again.answers == {"1": Answer("1", "yes")}


def open_log(output: Path, first_step: int, tensorboard: bool = False) -> Log:
    recipe = Recipe(output=output, tensorboard=tensorboard)
    return Log(
        output, total_steps=9, first_step=first_step, device=torch.device("cpu"),
        trackers=lambda step: open_trackers(recipe, step),
    )  # fmt: skip


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_log_that_meets_a_full_disk_says_so_once_and_keeps_its_rows(
    tensorboard: bool, tmp_path: Path, small_files: None, capsys: pytest.CaptureFixture[str]
) -> None:
    if tensorboard:
        pytest.importorskip("tensorboard", reason="TensorBoard is in the train extra")
    with pytest.raises(TrainingError, match=r"takes no more of the log \(File too large\); make room, then resume"):  # noqa: SIM117
        with open_log(tmp_path / "run", 0, tensorboard) as log:
            for step in range(500):
                log.step(step, {"loss": 1.0, "tokens_per_s": 1.0, "memory_gib": 1.0}, 1.0)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with open_log(tmp_path / "run", 5) as log:
        rows = log.rows
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert before.startswith((tmp_path / "run" / "metrics.jsonl").read_bytes())
    assert "Traceback" not in capsys.readouterr().err


def test_an_output_that_is_a_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(TrainingError, match="run is a file"):
        open_log(tmp_path / "run", 0)
    assert (tmp_path / "run").read_text() == "mine"
