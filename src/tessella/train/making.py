"""What a sitting is made of: the steps to learn from, the layout on the ranks, and the seeds of chance.

In: a recipe and the ranks.  Out: Steps, the kind of Layout, a seed.
"""

import hashlib
import signal
from collections.abc import Sequence

import torch

from tessella.checkpoint.read import Loaded
from tessella.errors import ConfigError
from tessella.train.batch import Steps
from tessella.train.layouts import Layout
from tessella.train.preference import PairSteps
from tessella.train.recipe import Recipe
from tessella.train.sample import Sample
from tessella.train.sharded import Sharded
from tessella.train.world import World


def steps_of(recipe: Recipe, samples: Sequence[Sample], loaded: Loaded, world: World) -> Steps:
    """What each step learns from: samples, or pairs of answers where it learns to prefer."""
    looks = max(1, round(recipe.epochs * len(samples)))
    if recipe.method != "sft":
        return PairSteps(
            samples, loaded.inputs, looks=looks, samples_per_step=recipe.samples_per_step, tokens_per_pass=recipe.tokens_per_pass,
            seed=recipe.seed, augmentation=recipe.augment, packing=recipe.packing,
        )  # fmt: skip
    return Steps(
        samples, loaded.inputs, looks=looks, samples_per_step=recipe.samples_per_step, tokens_per_pass=recipe.tokens_per_pass,
        seed=recipe.seed, augmentation=recipe.augment, packing=recipe.packing, rank=world.rank, ranks=world.size,
    )  # fmt: skip


def layout_of(recipe: Recipe, world: World) -> type[Layout]:
    """How the run lies on its ranks; one rank holds all, whatever the recipe says. Raises ConfigError for what ranks cannot."""
    if not world.alone and recipe.method != "sft":
        raise ConfigError(f'method is "{recipe.method}", which is taught in one process so far; leave --nproc away')
    shared = not world.alone and recipe.parallel != "ddp"
    if recipe.offload and not (shared and torch.cuda.is_available()):
        raise ConfigError("offload moves a GPU's shares of weights and moments away; it goes with --parallel fsdp2 on GPUs")
    if shared and (recipe.decoders or recipe.quantise):
        raise ConfigError("decoders and quantise are not cut into shares so far; leave them out, or say --parallel ddp")
    return Sharded if shared else Layout


def chance_of(seed: int, step: int, rank: int) -> int:
    """The seed of what chance decides in one step on one rank."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:8], "big") >> 1


def quiet_worker(number: int) -> None:
    """Ctrl-C is the run's to answer, not its workers'; one thread each, for they share the cores."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
