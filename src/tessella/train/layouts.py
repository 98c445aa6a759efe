"""How weights, gradients and moments lie on the ranks, and how a step is taken there.

In: packs of this rank.  Out: one and the same update on all ranks, of the loss summed over the learned tokens of all of them.
A checkpoint holds whole tensors whatever the layout, so that each layout resumes from every other.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tessella.model.vision_language import VisionLanguageModel
from tessella.train.batch import Pack, StepData
from tessella.train.optimiser import Optimiser
from tessella.train.passes import Passes
from tessella.train.recipe import Recipe
from tessella.train.taught import Taught
from tessella.train.world import World

BUCKET = 1 << 26  # numbers that travel together: 256 MiB in float32


class Layout:
    """Every rank holds everything ("ddp"), or there is one rank.

    Gradients are summed once a step, in float32, after all passes: nothing is said during the backward run, ranks may have
    different numbers of passes, and a part that got no gradient here may have got one elsewhere.
    """

    in_step = False  # True: all ranks must run the same number of passes, at the same time
    passes: Passes

    def __init__(self, world: World, model: VisionLanguageModel, taught: Taught, recipe: Recipe, total_steps: int):
        self.world, self.model = world, model
        self.optimiser = Optimiser(taught, recipe, total_steps)

    def take(self, passes: Passes) -> None:
        """The passes that are run; they come later, for some of them look at the optimiser."""
        self.passes = passes

    def loss(self, pack: Pack) -> Tensor:
        """Cross-entropy summed over the learned tokens of a pack, a scalar."""
        return self.passes.loss(pack)

    def learn(self, pack: Pack, data: StepData) -> Tensor:
        """Forward and backward of one of the packs of a step; gives its part of the step's loss."""
        loss = self.passes.share(pack, data)
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        self.optimiser.accumulate()
        return loss.detach()

    def step(self, step: int) -> Tensor:
        """Take step number `step` (from 0); gives the gradient's norm over all ranks before clipping."""
        if not self.world.alone:
            sum_gradients(self.world, list(self.optimiser.masters.values()))
        return self.optimiser.step(step)

    def put(self, values: dict[str, Tensor]) -> None:
        """Take these learned values, whole, by their names in an adapter file."""
        self.optimiser.put(values)

    def forget(self) -> None:
        """Drop the gradients of a step that is not to be taken."""
        self.optimiser.forget()

    def factor(self, step: int) -> float:
        """Share of the peak learning rate at a step."""
        return self.optimiser.factor(step)

    def values(self) -> dict[str, Tensor]:
        """The learned values, whole and in float32, by their names in an adapter file. Every rank must ask."""
        return self.optimiser.values()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds, whole tensors. Every rank must ask."""
        return self.optimiser.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take what state() gave, in whatever layout."""
        self.optimiser.restore(state)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, the model can be run on its own, layer by layer, as generation does."""
        yield


@torch.no_grad()
def sum_gradients(world: World, masters: list[Tensor]) -> None:
    """Each gradient becomes the sum over the ranks; a rank that has none where another has one counts as zeros."""
    have = torch.tensor([master.grad is not None for master in masters], dtype=torch.uint8)
    world.sum(have)  # how many have it
    wanted = [master for master, ranks in zip(masters, have.tolist(), strict=True) if ranks]
    for bucket in buckets(wanted):
        flat = torch.cat([(m.grad if m.grad is not None else torch.zeros_like(m)).reshape(-1) for m in bucket])
        world.sum(flat)
        for master, summed in zip(bucket, flat.split([m.numel() for m in bucket]), strict=True):
            master.grad = summed.view_as(master)


def buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours that travel together, each bucket up to BUCKET numbers or one tensor."""
    held: list[Tensor] = []
    for tensor in tensors:
        if held and sum(t.numel() for t in held) + tensor.numel() > BUCKET:
            yield held
            held = []
        held.append(tensor)
    if held:
        yield held
