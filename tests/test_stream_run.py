"""A run over a streamed set: the same bits after a stop as without one, and a stop when too much of it is bad."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("peft", reason="teaching goes through PEFT, which is not installed: it is in the train extra")

from tessella.errors import DataError
from tessella.train.loop import train
from tessella.train.recipe import Recipe
from tiny import tiny_folder


def recipe_of(tmp_path: Path) -> Recipe:
    model = tiny_folder(tmp_path / "tiny", "LlamaForCausalLM")
    rows = []
    for n in range(10):
        Image.new("RGB", (56, 56), (20 * n, 90, 40)).save(tmp_path / f"{n}.png")
        turns = [{"from": "human", "value": f"What is {n}?"}, {"from": "gpt", "value": f"apple {n}"}]
        rows.append(json.dumps({"image": f"{n}.png", "conversations": turns}))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    return Recipe(
        model=str(model), data=(tmp_path / "rows.jsonl",), stream=True, held_out=0, samples_per_step=3, epochs=1.5, lora_rank=2,
        dtype="float32", output=tmp_path / "whole", device="cpu", save_every=1, keep=9, tensorboard=False,
    )  # fmt: skip


def learned(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter/adapter_model.safetensors")


def test_a_streamed_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    assert train(recipe).finished
    stopped = replace(recipe, output=tmp_path / "stopped", resume=True)
    for step in ("step-000001", "step-000002"):  # what a run killed after its second step has
        shutil.copytree(recipe.output / "checkpoints" / step, stopped.output / "checkpoints" / step)
    went_on = train(stopped)
    assert (went_on.finished, went_on.steps) == (True, 5)
    whole, later = learned(recipe.output), learned(stopped.output)
    assert whole.keys() == later.keys()
    assert all(torch.equal(whole[name], later[name]) for name in whole)


def test_a_streamed_run_whose_rows_turn_out_bad_stops(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    for n in range(5):
        (tmp_path / f"{n}.png").unlink()
    with pytest.raises(DataError, match=r"(?s)turned out bad while training.*picture missing"):
        train(recipe)
