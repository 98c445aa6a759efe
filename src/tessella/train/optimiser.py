"""AdamW over float32 masters, with warm-up, cosine and clipping.

In: learning parameters and their gradients, pass by pass.  Out: updated parameters.
A parameter that computes in bfloat16 has a float32 master here: gradients of all passes are summed in float32, the step is
taken in float32, and the result is rounded into the parameter once a step (autocast would cast at every use).
"""

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tessella.train.recipe import Recipe
from tessella.train.taught import Taught

SUMS = "sums"
LAYER = re.compile(r"(language_model|vision_model)\..*?layers\.(\d+)\.")


def learning_rate_factor(step: int, total: int, warmup_share: float) -> float:
    """Share of the peak rate at a step (from 0): a straight rise, then half a cosine that reaches 0 after the last step."""
    warmup = round(warmup_share * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def decays(name: str, parameter: Tensor) -> bool:
    """Matrices decay; norms, biases, layer scales, DoRA's magnitudes and position tables do not."""
    return parameter.dim() >= 2 and name.endswith("weight")


def peak_of(part: str, recipe: Recipe) -> float:
    """The peak learning rate of "language", "tower", "projector" or "decoders"."""
    own = {"tower": recipe.tower_learning_rate, "projector": recipe.projector_learning_rate}
    own |= {"decoders": recipe.decoder_learning_rate}
    return own.get(part) or recipe.learning_rate


def depths_of(names: Iterable[str]) -> dict[str, int]:
    """The number of the last taught layer of each stack: {"language_model": 23, "vision_model": 23}."""
    depths: dict[str, int] = {}
    for name in names:
        found = LAYER.match(name)
        if found:
            depths[found[1]] = max(depths.get(found[1], 0), int(found[2]))
    return depths


def layers_above(name: str, depths: Mapping[str, int]) -> int:
    """How many layers lie between a parameter and the top of its stack: 0 in the last layer and for norm, head and projector;
    the embeddings lie below the first.
    """
    found = LAYER.match(name)
    if found:
        return depths[found[1]] - int(found[2])
    stack = name.split(".")[0]
    return depths.get(stack, -1) + 1 if ".embed" in name else 0


class Optimiser:
    """Owns the masters. Call accumulate() after each backward pass and step() at the end of a step."""

    def __init__(self, taught: Taught, recipe: Recipe, total_steps: int):
        self.parameters = taught.parameters
        self.total_steps, self.warmup_share, self.max_grad_norm = total_steps, recipe.warmup_share, recipe.max_grad_norm
        self.masters: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            # A float32 parameter is its own master. The memory map of a checkpoint must not be trained in place.
            if not isinstance(parameter.data, DTensor):  # a share of one is memory of its own already
                parameter.data = parameter.data.clone()
            own = parameter if parameter.dtype == torch.float32 else parameter.detach().float().requires_grad_()
            self.masters[name] = own
        self.rounded = [name for name in self.parameters if self.masters[name] is not self.parameters[name]]
        groups: dict[tuple[float, bool], list[Tensor]] = {}
        depths = depths_of(self.parameters)
        for name, master in self.masters.items():
            rate = peak_of(taught.part_of(name), recipe) * recipe.layer_decay ** layers_above(name, depths)
            groups.setdefault((rate, decays(name, master)), []).append(master)
        self.peaks = [rate for rate, _ in groups]
        listed = [
            {"params": some, "lr": rate, "weight_decay": recipe.weight_decay if decayed else 0.0}
            for (rate, decayed), some in groups.items()
        ]
        # What a loss adds up over the steps, (sum, count): settled by whole steps, and of the step under way.
        self.sums = torch.zeros(2, device=next(iter(self.masters.values())).device)
        self.pending: Tensor | None = None
        self.adamw = torch.optim.AdamW(listed, betas=recipe.betas, fused=True)

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the gradients of a backward pass to the masters' and drop them."""
        first: list[tuple[Tensor, Tensor]] = []
        later: list[tuple[Tensor, Tensor]] = []
        for name in self.rounded:
            parameter, master = self.parameters[name], self.masters[name]
            if parameter.grad is None:  # a pass without pictures gives the projector none
                continue
            if master.grad is None:
                master.grad = torch.empty_like(master)
                first.append((master.grad, parameter.grad))
            else:
                later.append((master.grad, parameter.grad))
            parameter.grad = None
        if first:
            torch._foreach_copy_([own for own, _ in first], [new for _, new in first])
        if later:
            torch._foreach_add_([own for own, _ in later], [new.float() for _, new in later])

    def step(self, step: int) -> Tensor:
        """Clip, take step number `step` (from 0) and round into the parameters; gives the gradient's norm before clipping."""
        factor = self.factor(step)
        for group, peak in zip(self.adamw.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        learning = [master for master in self.masters.values() if master.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(learning, self.max_grad_norm)
        self.adamw.step()
        if self.pending is not None:
            self.sums += self.pending
        self.forget()
        self._round()
        return norm

    def factor(self, step: int) -> float:
        """Share of the peak learning rate at a step."""
        return learning_rate_factor(step, self.total_steps, self.warmup_share)

    def add(self, numbers: Tensor) -> None:
        """numbers of a pass, any shape: into the sum and the count of the step under way."""
        found = torch.stack((numbers.sum(), torch.full_like(numbers.sum(), numbers.numel()))).to(self.sums)
        self.pending = found if self.pending is None else self.pending + found

    def forget(self) -> None:
        """Drop all gradients, and what the step under way has added up."""
        self.pending = None
        for name, master in self.masters.items():
            master.grad = self.parameters[name].grad = None

    @torch.no_grad()
    def _round(self) -> None:
        if self.rounded:
            torch._foreach_copy_([self.parameters[n].data for n in self.rounded], [self.masters[n] for n in self.rounded])

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        """Take these learned values, by their names in an adapter file."""
        for name, value in values.items():
            self.masters[name].copy_(value)
        self._round()

    def values(self) -> dict[str, Tensor]:
        """The learned values in float32, by their names in an adapter file."""
        return {name: master.detach() for name, master in self.masters.items()}

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs, flat: learned.<name>, first.<name>, second.<name>, steps.<name>, sums."""
        out = {f"learned.{name}": value for name, value in self.values().items()} | {SUMS: self.sums}
        for name, master in self.masters.items():
            held = self.adamw.state.get(master, {})
            if held:
                out |= {f"first.{name}": held["exp_avg"], f"second.{name}": held["exp_avg_sq"], f"steps.{name}": held["step"]}
        return out

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Take what state() gave."""
        if SUMS in state:  # checkpoints of 2026-11-29 and before have none
            self.sums.copy_(state[SUMS])
        for name, master in self.masters.items():
            master.copy_(state[f"learned.{name}"])
            if f"first.{name}" in state:
                self.adamw.state[master] = {
                    "step": state[f"steps.{name}"].to(master.device, torch.float32).reshape(()),
                    "exp_avg": state[f"first.{name}"].to(master.device).clone(),
                    "exp_avg_sq": state[f"second.{name}"].to(master.device).clone(),
                }
        self._round()
