"""Several processes give what one gives: losses, gradients, answers, and checkpoints that go over from one layout to another."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("peft", reason="teaching goes through PEFT, which is not installed: it is in the train extra")

from colours import colour_samples, interrupt_at
from tessella.checkpoint.read import load
from tessella.errors import ConfigError, TrainingError
from tessella.train import loop
from tessella.train.batch import Steps
from tessella.train.launch import free_port
from tessella.train.layouts import Layout
from tessella.train.loop import train
from tessella.train.lora import prepare
from tessella.train.making import layout_of
from tessella.train.passes import Passes
from tessella.train.recipe import Recipe
from tessella.train.world import World, shares
from tiny import tiny_folder
from two_ranks import mixed_samples, ranks_recipe

NEAR = 2e-5  # of losses in float32, between one process and two


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("base") / "tiny", "LlamaForCausalLM")


@pytest.fixture(scope="module")
def home(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of two_ranks.py, and the ones of a single process that they are compared with."""
    home = tmp_path_factory.mktemp("ranks")
    samples, held_out = mixed_samples(), colour_samples(5)
    train(ranks_recipe(folder, home / "moved"), samples=samples, on_event=interrupt_at(2))
    port = free_port()
    words = [sys.executable, str(Path(__file__).parent / "two_ranks.py"), str(folder), str(home)]
    ranks = []
    for rank in range(2):
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{key: str(value) for key, value in told.items()}, "OMP_NUM_THREADS": "1"}
        ranks.append(subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True))
    train(ranks_recipe(folder, home / "one"), samples=samples)
    train(ranks_recipe(folder, home / "one-all", tower="full", language="full", max_steps=2), samples=samples)
    train(ranks_recipe(folder, home / "looked-one", evaluate_every=3, sample_answers=5), samples=samples, held_out=held_out)
    said = [rank.communicate(timeout=280)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    assert "teaching" in said[0] and "teaching" not in said[1]  # the first rank alone speaks
    return home


def rows_of(output: Path, key: str) -> dict[int, float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


def adapter_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(("several", "one"), [("ddp", "one"), ("fsdp2", "one"), ("zero2", "one"), ("fsdp2-all", "one-all")])
def test_two_processes_learn_what_one_learns(home: Path, several: str, one: str) -> None:
    for key in ("loss", "grad_norm"):
        ours, theirs = rows_of(home / several, key), rows_of(home / one, key)
        assert ours.keys() == theirs.keys() and len(ours) >= 2
        assert all(abs(ours[step] - theirs[step]) < NEAR * max(1, theirs[step]) for step in ours)


def test_the_adapters_of_one_and_two_processes_are_near(home: Path) -> None:
    theirs = adapter_of(home / "one")
    for name in ("ddp", "fsdp2"):
        ours = adapter_of(home / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[key], theirs[key], atol=1e-4) for key in ours)


def test_a_run_moves_from_one_process_to_two_and_from_ddp_to_fsdp2(home: Path) -> None:
    ours, theirs = rows_of(home / "moved", "loss"), rows_of(home / "one", "loss")
    assert ours.keys() == theirs.keys()
    assert all(abs(ours[step] - theirs[step]) < NEAR * max(1, theirs[step]) for step in ours)


def test_a_run_begun_in_shares_goes_on_alone(home: Path, folder: Path) -> None:
    assert max(rows_of(home / "back", "loss")) == 2
    train(ranks_recipe(folder, home / "back", resume=True), samples=mixed_samples())
    ours, theirs = rows_of(home / "back", "loss"), rows_of(home / "one", "loss")
    assert all(abs(ours[step] - theirs[step]) < NEAR * max(1, theirs[step]) for step in theirs)


@pytest.mark.parametrize("several", ["looked", "looked-fsdp2"])
def test_what_is_held_out_is_looked_at_once_whoever_does_it(home: Path, several: str) -> None:
    ours, theirs = rows_of(home / several, "held_out_loss"), rows_of(home / "looked-one", "held_out_loss")
    assert ours.keys() == theirs.keys() == {0, 3, 6}
    assert all(abs(ours[step] - theirs[step]) < NEAR * max(1, theirs[step]) for step in ours)
    assert rows_of(home / several, "held_out_samples") == rows_of(home / "looked-one", "held_out_samples")
    said, expected = rows_of(home / several, "answers"), rows_of(home / "looked-one", "answers")
    assert [row["question"] for row in said[0]] == [row["question"] for row in expected[0]]
    assert [row["answer"] for row in said[0]] == [row["answer"] for row in expected[0]]  # before anything was learned


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("tokens_per_pass", [64, 4096])
def test_gradients_are_the_same_for_every_split(folder: Path, tmp_path: Path, ranks: int, tokens_per_pass: int) -> None:
    def gradients(size: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        recipe = ranks_recipe(folder, tmp_path)
        loaded = load(folder, device="cpu", dtype="float32", max_tiles=3)
        layout = Layout(World(), loaded.model, prepare(loaded.model, recipe), recipe, 6)
        layout.take(Passes(loaded.model, recipe))
        loaded.model.train()
        parts = [
            Steps(mixed_samples(), loaded.inputs, looks=12, samples_per_step=12, tokens_per_pass=tokens_per_pass, seed=0,
                  rank=rank, ranks=size)[0] for rank in range(size)
        ]  # fmt: skip
        learned = sum(part.learned for part in parts)
        for part in parts:
            for pack in part.packs:
                layout.learn(pack, replace(part, everywhere=(learned, 0)))
        return {name: master.grad for name, master in layout.optimiser.masters.items() if master.grad is not None}

    one, several = gradients(1), gradients(ranks)
    assert one.keys() == several.keys()
    scale = max(float(gradient.abs().max()) for gradient in one.values())
    assert all(float((one[name] - several[name]).abs().max()) <= 1e-6 * scale for name in one)


def test_shares_hold_each_sample_once_and_about_as_many_tokens() -> None:
    lengths = [900, 40, 35, 300, 310, 280, 5, 7]
    given = shares(lengths, 3)
    assert sorted(index for some in given for index in some) == list(range(8))
    sums = [sum(lengths[index] for index in some) for some in given]
    assert max(sums) == 900 and min(sums) > 350
    assert [len(some) for some in shares([0] * 7, 3)] == [3, 2, 2]  # not measured: by count


def test_more_ranks_than_samples_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "join", lambda: World(0, 5, 0))
    monkeypatch.setattr(World, "share", lambda self, value: value)
    with pytest.raises(TrainingError, match=r"5 ranks, but only 3 samples to train on.*lower nproc"):
        train(ranks_recipe(folder, tmp_path), samples=mixed_samples()[:3])
    with pytest.raises(TrainingError, match=r"5 ranks, but only 4 samples_per_step.*raise samples_per_step"):
        train(ranks_recipe(folder, tmp_path), samples=mixed_samples())


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"offload": True}, r"goes with --parallel fsdp2 on GPUs"),
        ({"parallel": "fsdp2", "quantise": ("language",)}, r"not cut into shares so far.*--parallel ddp"),
        ({"parallel": "fsdp2", "decoders": ("boxes",)}, r"not cut into shares so far"),
        ({"method": "dpo"}, r'method is "dpo", which is taught in one process so far; leave --nproc away'),
    ],
)
def test_what_several_ranks_cannot_do_is_refused_with_a_way_out(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        layout_of(Recipe(**wrong), World(0, 2, 0))


# ---- the command


def photos(folder: Path) -> Path:
    for sample in colour_samples():
        place = folder / sample.answer / f"{sample.key}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        sample.pictures[0].source.save(place)
    return folder


def two(folder: Path, home: Path, *more: str) -> "subprocess.Popen[str]":
    """`tessella finetune --nproc 2` on a few pictures."""
    data = photos(home / "photos")
    words = ["--model", str(folder), "--data", str(data), "--output", str(home / "run"), "--nproc", "2", "--device", "cpu"]
    words += ["--samples-per-step", "4", "--no-tensorboard", "--report-every", "1", "--dtype", "float32", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tessella.cli", "finetune", *words]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for_a_checkpoint(home: Path, process: "subprocess.Popen[str]") -> None:
    """Any: the first ones are soon cleared away again, and none that is waited for by name may ever be seen."""
    while not list((home / "run/checkpoints").glob("step-*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)


def test_ctrl_c_stops_all_ranks_at_one_step_and_resume_goes_on(folder: Path, tmp_path: Path) -> None:
    process = two(folder, tmp_path, "--epochs", "5000", "--save-every", "1", "--json", str(tmp_path / "r.json"))
    wait_for_a_checkpoint(tmp_path, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130, said
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["stopped_by"] == "interrupted" and result["ranks"] == 2
    assert f"step-{result['steps']:06d}" in {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert said.count("stopping after this step") == 1 and said.count("12 samples used") <= 1


def test_a_rank_that_dies_ends_all_and_its_end_is_told(folder: Path, tmp_path: Path) -> None:
    process = two(folder, tmp_path, "--epochs", "5000", "--save-every", "1")
    wait_for_a_checkpoint(tmp_path, process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 2
    assert "rank 1 of 2 was killed by signal 9 (SIGKILL)" in said and "--resume goes on" in said and "Traceback" not in said
    assert (tmp_path / "run/checkpoints").is_dir()
