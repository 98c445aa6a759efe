"""Weights, gradients and moments cut into shares, one a rank: FSDP2, torch's own fully_shard.

In: a model and what of it learns.  Out: a Layout whose checkpoints hold whole tensors, like any other.
The stages of ZeRO (arXiv:1910.02054) are the same cut: 3 lets a layer's gathered weights go behind each use, 2 keeps them from
the forward run to the backward one. DeepSpeed is not needed for either.
accelerate's FSDP2 was looked at and not taken: it makes the optimiser's parameters anew by itself and knows one type for all,
where our frozen weights stay in the model's type and what learns is its own float32 master.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tessella.model.vision_language import VisionLanguageModel
from tessella.train.batch import Pack, StepData
from tessella.train.layouts import Layout
from tessella.train.passes import Passes
from tessella.train.recipe import Recipe
from tessella.train.taught import Taught
from tessella.train.world import World


class Lesson(nn.Module):
    """A pass as one module's forward, which is where the gathering of weights hangs on."""

    passes: Passes

    def __init__(self, model: VisionLanguageModel):
        super().__init__()
        self.model = model
        size = model.config.tile_size_px
        self.blank_tile = torch.zeros(1, 3, size, size, dtype=torch.uint8)

    def forward(self, pack: Pack, data: StepData | None) -> Tensor:
        """A pack's part of a step's loss, or without a step its summed loss; a scalar.

        Without a picture a blank tile is looked at for nothing: all ranks ask each part alike.
        """
        loss = self.passes.loss(pack) if data is None else self.passes.share(pack, data)
        if len(pack.tiles):
            return loss
        seen = self.passes.see(replace(pack, tiles=self.blank_tile, digests=("blank",)))
        return loss if seen is None else loss + 0 * seen.sum().to(loss)


class Sharded(Layout):
    """A layer is gathered when its turn comes and let go behind it.

    What learns is kept in float32, its own master, and computes in the model's type. A frozen tower stays whole on each rank,
    because what it says of a tile is computed once and kept, at other times on other ranks.
    """

    in_step = True

    def __init__(self, world: World, model: VisionLanguageModel, taught: Taught, recipe: Recipe, total_steps: int):
        # A layer's gradients are sent when the gradient of its input is there; a pass of text over frozen embeddings would have
        # none for the first layer, which would then send later than on a rank that sees pictures.
        model.language_model.model.embed_tokens.register_forward_hook(wants_gradient)
        self.lesson = Lesson(model)
        self.lets_go = recipe.parallel != "zero2"
        shard(self.lesson, taught, recipe, self.lets_go)
        # Sharding puts other parameters in the place of those that were there, in the same order.
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        named = dict(zip(taught.parameters, learning, strict=True))
        super().__init__(world, model, replace(taught, parameters=named), recipe, total_steps)

    def take(self, passes: Passes) -> None:
        passes.lowest = 0  # layers below the first that learns are gathered too, so all ranks run them in step
        self.passes = self.lesson.passes = passes

    def loss(self, pack: Pack) -> Tensor:
        loss: Tensor = self.lesson(pack, None)
        return loss

    def learn(self, pack: Pack, data: StepData) -> Tensor:
        loss: Tensor = self.lesson(pack, data)
        if not pack.keys:  # a blank pack, to keep in step
            loss = 0 * loss
        # FSDP takes the mean over the ranks, and the sum is wanted.
        (loss * self.world.size).backward()  # type: ignore[no-untyped-call, unused-ignore]
        return loss.detach()

    def step(self, step: int) -> Tensor:
        return whole(self.optimiser.step(step))

    def values(self) -> dict[str, Tensor]:
        return self._gathered(self.optimiser.values())

    def state(self) -> dict[str, Tensor]:
        return self._gathered(self.optimiser.state())

    def _gathered(self, shares: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors in the first rank's memory, one after the other; the other ranks only help."""
        out = {}
        for name, share in shares.items():
            tensor = whole(share)
            if self.world.main:
                out[name] = tensor.cpu()
        return out

    def restore(self, state: dict[str, Tensor]) -> None:
        parts = {name: name.partition(".") for name in state}
        self.optimiser.restore({
            name: tensor if parts[name][0] == "steps" else self._cut(parts[name][2], tensor) for name, tensor in state.items()
        })  # fmt: skip

    def put(self, values: dict[str, Tensor]) -> None:
        self.optimiser.put({name: self._cut(name, value) for name, value in values.items()})

    def _cut(self, name: str, value: Tensor) -> Tensor:
        """This rank's share of a whole tensor. Every rank has the whole, so nobody needs to send anything."""
        master = self.optimiser.masters.get(name)
        if not isinstance(master, DTensor):
            return value
        return distribute_tensor(value.to(master.device), master.device_mesh, master.placements, src_data_rank=None)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        parts = [module for module in self.lesson.modules() if isinstance(module, FSDPModule)]
        with torch.no_grad():
            for part in parts:
                part.set_reshard_after_forward(False, recurse=False)
                part.unshard()
        try:
            yield
        finally:
            for number, part in enumerate(parts):  # the lesson itself is the first
                part.set_reshard_after_forward(self.lets_go and number > 0, recurse=False)
                part.reshard()


def shard(lesson: Lesson, taught: Taught, recipe: Recipe, lets_go: bool) -> None:
    """Cut the lesson's parameters: each decoder layer (and layer of a tower that learns) by itself, then the rest.

    lets_go: a layer's gathered weights go behind its forward run, and are gathered again for its backward run.
    """
    model = lesson.model
    for parameter in taught.parameters.values():
        parameter.data = parameter.data.float()
    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=model.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy() if recipe.offload else OffloadPolicy()
    kept_whole = set(model.vision_model.parameters()) if recipe.tower == "frozen" else set()
    tower = [] if kept_whole else list(model.vision_model.encoder.layers)
    for layer in (*model.language_model.model.layers, *tower):
        fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=lets_go)
    fully_shard(
        lesson, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=False, ignored_params=kept_whole
    )


def wants_gradient(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """A forward hook: the output takes part in the backward run, whether the module learns or not."""
    return out if out.requires_grad or not torch.is_grad_enabled() else out.requires_grad_()


def whole(tensor: Tensor) -> Tensor:
    """All ranks' shares together; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
