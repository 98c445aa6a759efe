"""A run loses nothing: killed, out of room, out of memory, or led astray by a bad batch, it goes on from what stands."""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("peft", reason="teaching goes through PEFT, which is not installed: it is in the train extra")

from colours import colour_samples, interrupt_at, recipe_of
from tessella.errors import MemoryError_, TrainingError
from tessella.train import state
from tessella.train.batch import Pack
from tessella.train.held_out import HeldOut
from tessella.train.lock import Lock
from tessella.train.loop import train
from tessella.train.passes import Passes
from tessella.train.recipe import Recipe
from tiny import tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("base") / "tiny", "LlamaForCausalLM")


def values_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


def losses_of(output: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A sum's last bits depend on how many threads share it, and a forked child can have one only."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train_in_a_child(recipe: Recipe) -> int:
    """A forked process that runs the recipe and ends: what a kill ends is a whole process, without starting Python anew."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 2)
        torch.set_num_threads(1)
        train(recipe, samples=colour_samples())
        code = 0
    finally:
        os._exit(code)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_kills_at_random_moments_cost_nothing_and_change_no_bit(folder: Path, tmp_path: Path, one_thread: None) -> None:
    recipe = recipe_of(folder, tmp_path / "a", save_every=1, lora_dropout=0.2, report_every=4, epochs=4.0)
    started = time.monotonic()
    train(recipe, samples=colour_samples())
    took = time.monotonic() - started
    killed = replace(recipe, output=tmp_path / "b", resume=True)
    chance = random.Random(0)
    kills = 0
    while kills < 5:
        pid = train_in_a_child(killed)
        time.sleep(chance.uniform(0.2, 1.0) * took)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        kills += 1
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0  # it was done before the kill came
            break
    train(killed, samples=colour_samples())
    ours, theirs = values_of(tmp_path / "b"), values_of(tmp_path / "a")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert losses_of(tmp_path / "b") == losses_of(tmp_path / "a")


def test_a_run_that_stops_between_two_reports_reports_the_same_means(folder: Path, tmp_path: Path, one_thread: None) -> None:
    recipe = recipe_of(folder, tmp_path / "a", report_every=4, epochs=4.0)
    train(recipe, samples=colour_samples())
    stopped = replace(recipe, output=tmp_path / "b", save_every=3)
    pid = train_in_a_child(stopped)
    while not (tmp_path / "b/checkpoints/step-000003").is_dir():
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    train(replace(stopped, resume=True), samples=colour_samples())
    assert losses_of(tmp_path / "b") == losses_of(tmp_path / "a")


def test_a_file_that_may_not_grow_keeps_the_last_good_checkpoint(folder: Path, tmp_path: Path) -> None:
    """A limit of the system, met in the middle of writing, where looking at the free room beforehand does not help."""
    import resource

    recipe = recipe_of(folder, tmp_path, save_every=2)

    def limit(event: object) -> None:
        if (tmp_path / "checkpoints/step-000002").is_dir() and not limited:
            limited.append(resource.getrlimit(resource.RLIMIT_FSIZE))
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limited[0][1]))

    limited: list[tuple[int, int]] = []
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(TrainingError, match=r"could not be saved at step 4.*Older checkpoints stand; go on with: tess"):
            train(recipe, samples=colour_samples(), on_event=limit)
    finally:
        if limited:
            resource.setrlimit(resource.RLIMIT_FSIZE, limited[0])
        signal.signal(signal.SIGXFSZ, before)
    assert [path.name for path in state.saved(tmp_path)] == ["step-000002"]
    assert train(replace(recipe, resume=True), samples=colour_samples()).finished


# ---- bad batches


def spoil(monkeypatch: pytest.MonkeyPatch, factor: float, at: int) -> None:
    """The loss of call number `at` is multiplied."""
    plain, calls = Passes.token_losses, []

    def loss(self: Passes, hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
        calls.append(pack)
        return plain(self, hidden, pack) * (factor if len(calls) == at else 1.0)

    monkeypatch.setattr(Passes, "token_losses", loss)


def test_stepping_back_passes_the_bad_step_over_and_names_its_samples(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, float("nan"), 5)
    recipe = recipe_of(folder, tmp_path, save_every=2, report_every=3, on_nan="back")
    result = train(recipe, samples=colour_samples())
    assert result.finished and result.steps == 6
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    told = next(row["text"] for row in rows if row["kind"] == "back")
    assert "not finite at step 5" in told and "made:" in told and "step-000004; step 5 is passed over" in told
    assert [row["step"] for row in rows if "loss" in row] == [3, 6]
    newest, _ = state.newest(tmp_path)
    assert newest is not None and newest.progress.passed_over == [4]


def test_stepping_back_before_the_first_checkpoint_goes_to_the_beginning(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, float("inf"), 1)
    assert train(recipe_of(folder, tmp_path, on_nan="back"), samples=colour_samples()).finished


def test_a_run_that_steps_back_for_ever_stops(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Passes.token_losses
    monkeypatch.setattr(Passes, "token_losses", lambda self, hidden, pack: plain(self, hidden, pack) * float("nan"))
    with pytest.raises(TrainingError, match=r"stepped back 5 times already"):
        train(recipe_of(folder, tmp_path, on_nan="back", epochs=4.0), samples=colour_samples())


@pytest.mark.parametrize("answer", ["tell", "stop", "back"])
def test_a_loss_that_jumps_is_answered_as_the_recipe_says(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    spoil(monkeypatch, 50.0, 11)
    recipe = recipe_of(folder, tmp_path, save_every=5, epochs=4.0, on_spike=answer)
    if answer == "stop":
        with pytest.raises(TrainingError, match=r"the loss jumps at step 11 of 12.*samples: made:\d+"):
            train(recipe, samples=colour_samples())
        return
    assert train(recipe, samples=colour_samples()).finished
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows if row["kind"] in ("jump", "back")] == [{"tell": "jump", "back": "back"}[answer]]


# ---- memory, and two runs in one folder


def test_out_of_memory_saves_says_what_it_held_and_how_to_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = Passes.token_losses, []

    def loss(self: Passes, hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
        calls.append(pack)
        return torch.empty(1 << 56) if len(calls) == 4 else plain(self, hidden, pack)

    monkeypatch.setattr(Passes, "token_losses", loss)
    recipe = recipe_of(folder, tmp_path)
    words = (
        r"It held weights .*ran a pass of 4 rows, \d+ tokens and 4 tiles.*everything up to step 3 is saved: go on with: tessella "
    )
    with pytest.raises(MemoryError_, match=words + r"finetune .*recipe\.toml --resume --tokens-per-pass 4096$"):
        train(recipe, samples=colour_samples())
    monkeypatch.setattr(Passes, "token_losses", plain)
    rest = train(replace(recipe, resume=True, tokens_per_pass=4096), samples=colour_samples())
    assert rest.finished
    straight = train(replace(recipe, output=tmp_path / "straight"), samples=colour_samples())
    assert rest.losses == straight.losses


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_lives(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, tmp_path)
    with Lock(tmp_path), pytest.raises(TrainingError, match=rf"being written by process {os.getpid()} on .*another --output"):
        train(recipe, samples=colour_samples())
    assert train(recipe, samples=colour_samples()).finished


# ---- what is kept, and what resume tells


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path: Path) -> None:
    for step, worth in enumerate((0.1, 0.9, 0.9, None, 0.3, 0.2), 1):
        state.save(tmp_path, state.Progress(step, 6, {}, "", 0.0, worth), {"w": torch.zeros(1)}, keep=2, keep_best=True)
    assert [path.name for path in state.saved(tmp_path)] == ["step-000006", "step-000005", "step-000002"]
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.parametrize(("losses", "best"), [([5, 4, 3, 1, 2, 2, 4, 6, 7], {3}), ([1, 4, 3, 2, 2, 2, 4, 6, 7], set())])
def test_a_run_keeps_the_step_that_did_best_on_what_was_held_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: list[float], best: set[int]
) -> None:
    """The first look is before the first step; where nothing was better than that, only the last step is kept."""
    samples, told = colour_samples(), iter(losses)
    monkeypatch.setattr(HeldOut, "loss", lambda held_out, stop: float(next(told)))
    result = train(recipe_of(folder, tmp_path, evaluate_every=1, keep=1, epochs=4.0), samples=samples[:8], held_out=samples[8:])
    assert [loss for _, loss in result.held_out_losses] == losses
    assert {int(path.name[5:]) for path in state.saved(tmp_path)} == best | {result.steps}


def test_resume_tells_which_samples_changed(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, tmp_path, max_steps=2)
    samples = colour_samples()
    train(recipe, samples=samples)
    changed = [replace(samples[0], key="other"), *samples[1:-1], replace(samples[-1], key="new", place="made:99")]
    with pytest.raises(TrainingError, match=r"1 changed: made:0; 1 new: made:99; 1 gone: made:11"):
        train(replace(recipe, resume=True), samples=changed)
    with pytest.raises(TrainingError, match=r"the same samples in another order"):
        train(replace(recipe, resume=True), samples=samples[::-1])


def test_a_stopped_run_prints_the_command_that_goes_on(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(recipe_of(folder, tmp_path), samples=colour_samples(), on_event=interrupt_at(2))
    assert f"go on with: tessella finetune {tmp_path / 'recipe.toml'} --resume" in capfd.readouterr().err
