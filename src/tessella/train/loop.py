"""A recipe becomes a taught model: the run, step by step.

In: a Recipe (and samples, when a caller has its own).  Out: output/adapter in PEFT's format, or output/model in the official
layout when the language model is taught whole; checkpoints, metrics.jsonl, run.json and TensorBoard beside it.
The loss of a step is one mean over the learned tokens of all its passes on all ranks, so the split into passes and ranks changes
no gradient. What chance decides is a function of seed, step and rank, so a resumed run draws what it would have drawn.
"""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from tessella.checkpoint.adapters import learned_in
from tessella.errors import DataError, RankError, TrainingError
from tessella.inputs import Inputs
from tessella.train.begin import load_to_teach
from tessella.train.dataset import Ledger, RecipeData, Sample
from tessella.train.held_out import Exam
from tessella.train.lock import Lock
from tessella.train.log import Event
from tessella.train.lora import prepare
from tessella.train.multitask.teach import attach
from tessella.train.recipe import Recipe
from tessella.train.sitting import Run, TrainResult
from tessella.train.state import saved
from tessella.train.supply import supply
from tessella.train.world import World, is_lost, join


def train(
    recipe: Recipe,
    *,
    samples: Sequence[Sample] | None = None,
    held_out: Sequence[Sample] | None = None,
    exam: Exam | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> TrainResult:
    """Run a recipe. samples, held_out: instead of reading the recipe's data. exam: what is right; without one nothing is scored.

    Ctrl-C and time_limit_s save and return with finished False. Raises TrainingError (another recipe, output in use,
    non-finite loss, disk full), DataError, ConfigError, CheckpointError, MemoryError_.
    """
    started = time.monotonic()
    world = join()
    try:
        with Lock(recipe.output) if world.main else nullcontext():
            result = _train(recipe, world, samples, held_out, exam, on_event, started)
    except RuntimeError as error:
        if world.alone or not is_lost(error):
            raise
        raise RankError("another rank of this run has ended; what it said tells why") from error
    return result


def _train(
    recipe: Recipe, world: World, samples: Sequence[Sample] | None, held_out: Sequence[Sample] | None, exam: Exam | None,
    on_event: Callable[[Event], None] | None, started: float,
) -> TrainResult:  # fmt: skip
    if world.main:
        check_output(recipe)
    settle_chance(recipe)
    device = world.device(recipe.device)
    loaded, begin = load_to_teach(replace(recipe, device=device))
    loaded.inputs = Inputs(
        loaded.config, loaded.tokenizer, max_tiles=recipe.max_tiles, context_tokens=recipe.context_tokens, system=recipe.system,
        limit_megapixels=recipe.limit_megapixels, questions=loaded.inputs.questions,
    )  # fmt: skip
    attach(loaded, recipe)
    data = RecipeData(list(samples or ()), list(held_out or ()), Ledger(used=len(samples or ()) + len(held_out or ())))
    if samples is None:
        if recipe.stream:
            data = supply(recipe, loaded.inputs)  # open files, which each rank has for itself
        else:  # read and checked by the first rank alone, for all
            data = world.share(supply(recipe, loaded.inputs) if world.main else data)
    if not data.train:
        raise DataError("there is no sample to train on; give at least one")
    if min(len(data.train), recipe.samples_per_step) < world.size:
        what = "samples to train on" if len(data.train) < recipe.samples_per_step else "samples_per_step"
        raise TrainingError(
            f"{world.size} ranks, but only {min(len(data.train), recipe.samples_per_step)} {what}: a rank without a sample has "
            "nothing to do; lower nproc, or raise samples_per_step"
        )
    taught = prepare(loaded.model, recipe, begin)
    run = Run(recipe, loaded, taught, data if held_out is None else RecipeData(data.train, list(held_out), data.ledger), world,
              exam, started, on_event)  # fmt: skip
    return run.run()


def settle_chance(recipe: Recipe) -> None:
    """Initial LoRA from the seed; with `deterministic`, arithmetic that gives the same bits every time on a GPU too."""
    torch.manual_seed(recipe.seed)
    if recipe.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is computed there
        torch.use_deterministic_algorithms(True)


def check_output(recipe: Recipe) -> None:
    """Raises TrainingError when the output holds another run that would be lost."""
    base = learned_in(Path(recipe.model).expanduser()).resolve()
    if base in [(recipe.output / name).resolve() for name in ("adapter", "model")]:
        raise TrainingError(f"{base} is taught further, and would be written over; give another --output")
    if not recipe.resume and saved(recipe.output):
        raise TrainingError(f"{recipe.output} holds a run already; say --resume to go on with it, or give another --output")
