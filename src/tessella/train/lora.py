"""Which parameters learn: LoRA through PEFT beside linear layers, or whole parts; the rest is frozen.

In: a model and a recipe.  Out: Taught: the learning parameters by their name in an adapter file.
T tokens, I inputs, O outputs of a linear layer, r rank: A (r, I), B (O, r); y = W x + s B A x, s = alpha / r.
Source: arXiv:2106.09685; huggingface/peft.
"""

import difflib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from tessella.checkpoint.adapters import MAGNITUDE, state_of
from tessella.checkpoint.lowrank import Adapter
from tessella.errors import CheckpointError, ConfigError
from tessella.model.vision_language import VisionLanguageModel
from tessella.train.nf4 import Nf4Linear
from tessella.train.recipe import Recipe
from tessella.train.recompute import recompute
from tessella.train.taught import PARTS, Taught

NAME = "default"  # PEFT's name of the one adapter; not in the file
LAYERS = "language_model.model.layers."
# What InternLM2 and Phi-3 call their fused layers -> the layers that they are here.
FUSED = {
    "wqkv": ["q_proj", "k_proj", "v_proj"], "qkv_proj": ["q_proj", "k_proj", "v_proj"], "wo": ["o_proj"], "w1": ["gate_proj"],
    "w2": ["down_proj"], "w3": ["up_proj"], "gate_up_proj": ["gate_proj", "up_proj"],
}  # fmt: skip


def prepare(model: VisionLanguageModel, recipe: Recipe, start: Adapter | None = None) -> Taught:
    """Freeze the model, hang LoRA beside what the recipe names, and let the whole parts learn.

    start: an adapter fitted to the model that is gone on with. Raises ConfigError when a target is no linear layer of the
    model, CheckpointError when start is not of the recipe's form.
    """
    model.requires_grad_(False)
    targets = targets_of(model, recipe)
    if targets:
        config = LoraConfig(
            r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, lora_dropout=recipe.lora_dropout, target_modules=targets,
            use_rslora=recipe.rslora, use_dora=recipe.dora,
        )  # fmt: skip
        config._register_custom_module({nn.Linear: LoraLinear})
        inject_adapter_in_model(config, model, adapter_name=NAME)
    whole = [PARTS[part].removesuffix(".") for part in PARTS if getattr(recipe, part) in ("full", "train")]
    for name in whole:
        model.get_submodule(name).requires_grad_(True)
    if model.routing is not None and recipe.decoders:
        model.routing.requires_grad_(True)
    learning = {file_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    if start is not None:
        begin_at({name: p for name, p in learning.items() if not name.startswith(PARTS["decoders"])}, start, recipe)
    recompute(model, recipe.recompute)
    return Taught(learning, tuple(whole), bool(targets))


def targets_of(model: VisionLanguageModel, recipe: Recipe) -> list[str]:
    """Full names of the linear layers that get LoRA. Raises ConfigError when a target is none of the model."""
    targets = []
    if recipe.language == "lora":
        named = linear_layers(model, LAYERS, recipe.lora_targets, "lora_targets")
        lowest = lowest_taught(model, recipe)
        targets += [name for name in named if int(name.removeprefix(LAYERS).split(".")[0]) >= lowest]
    if recipe.tower == "lora":
        targets += linear_layers(model, "vision_model.encoder.layers.", recipe.tower_lora_targets, "tower_lora_targets")
    if recipe.projector == "lora":
        targets += [name for name, module in model.named_modules() if name.startswith("mlp1.") and isinstance(module, nn.Linear)]
    return targets


def scale_of(recipe: Recipe) -> float:
    """The factor of B A."""
    return recipe.lora_alpha / (recipe.lora_rank**0.5 if recipe.rslora else recipe.lora_rank)


def begin_at(learning: Mapping[str, nn.Parameter], start: Adapter, recipe: Recipe) -> None:
    """Put an adapter's tensors where the new ones would begin. Raises CheckpointError when they are not of the same form."""
    state, scale = state_of(start), scale_of(recipe)
    scales = sorted({pair.scale for pair in start.pairs.values()})
    mine = {name: tuple(parameter.shape) for name, parameter in learning.items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in state.items()}
    odd = [name for name in (*mine, *theirs) if mine.get(name) != theirs.get(name)]
    if odd or any(abs(one - scale) > 1e-6 * scale for one in scales):
        ranks = sorted({pair.rank for pair in start.pairs.values()})
        layers = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in start.pairs))
        whole = ", ".join(dict.fromkeys(name.split(".")[0] for name in start.whole)) or "nothing"
        here = (
            f"{odd[0]} is {theirs.get(odd[0], 'not there')} in it and {mine.get(odd[0], 'not taught')} here" if odd else "scale"
        )
        raise CheckpointError(
            f"{start.folder} cannot be taught further as it is: {here}. It has rank {ranks}, scale {scales}, layers {layers}, "
            f"whole {whole}; the recipe says rank {recipe.lora_rank}, scale {scale:g}: say the same, or --further on_top"
        )
    with torch.no_grad():
        for name, parameter in learning.items():
            parameter.copy_(state[name])


def lowest_taught(model: VisionLanguageModel, recipe: Recipe) -> int:
    """The first layer of the language model that gets LoRA. Raises ConfigError when there are fewer layers than asked for."""
    layers = model.config.language.num_layers
    if recipe.lora_layers is None:
        return 0
    if recipe.lora_layers > layers:
        raise ConfigError(
            f"lora_layers is {recipe.lora_layers}, but the language model has {layers} layers; leave it out for all"
        )
    return layers - recipe.lora_layers


def linear_layers(model: nn.Module, prefix: str, targets: tuple[str, ...], field: str) -> list[str]:
    """Full names of the linear layers below prefix whose name ends with a target. Raises ConfigError for an unknown one."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.startswith(prefix)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
            near = FUSED.get(target.rsplit(".", 1)[-1]) or difflib.get_close_matches(target, known, n=2, cutoff=0.5)
            hint = f"did you mean {', '.join(near)}? " if near else ""
            raise ConfigError(f'{field} names "{target}", which is no linear layer there; {hint}there are {", ".join(known)}')
    return [name for name in names if any(name == target or name.endswith(f".{target}") for target in targets)]


def file_name(name: str) -> str:
    """A parameter's name in the model -> its name in an adapter file."""
    if f".{MAGNITUDE}." in name:
        return name.removesuffix(f".{NAME}.weight")
    return name.replace(f".{NAME}.", ".").replace(".base_layer.", ".")


class LoraLinear(PeftLinear):
    """PEFT's LoRA layer; same parameters and same result, the arithmetic in one function with fewer passes over memory.

    On 2 CPU cores PEFT's own forward spends a third of a step in scaling and adding (T, O) matrices.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged or self.disable_adapters or args or kwargs or self.use_dora[NAME]:
            return super().forward(x, *args, **kwargs)
        base, a, b = self.base_layer, self.lora_A[NAME].weight, self.lora_B[NAME].weight
        seen: Tensor = self.lora_dropout[NAME](x)  # x itself where nothing is dropped
        if isinstance(base, Nf4Linear):
            return base(x) + F.linear(F.linear(seen, a) * self.scaling[NAME], b)
        if not torch.is_grad_enabled():
            return F.linear(x, base.weight, base.bias) + F.linear(F.linear(seen, a) * self.scaling[NAME], b)
        given = None if seen is x else x
        out: Tensor = LowRank.apply(seen, base.weight, base.bias, a, b, self.scaling[NAME], given)  # type: ignore[no-untyped-call, unused-ignore]
        return out


class LowRank(torch.autograd.Function):
    """y = x W^T + bias + s (d A^T) B^T, W and bias frozen; d is x after dropout, and given is x, or None where nothing is
    dropped. The scale sits on the r-wide product, not on the O-wide one.
    """

    @staticmethod
    def forward(
        ctx: Any, d: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, given: Tensor | None
    ) -> Tensor:
        flat = d.reshape(-1, d.shape[-1])
        low = (flat @ a.t()).mul_(scale)
        y = F.linear(flat if given is None else given.reshape(flat.shape), weight, bias).addmm_(low, b.t())
        ctx.save_for_backward(flat, low, weight, a, b)
        ctx.scale, ctx.shape, ctx.whole = scale, d.shape, given is None
        return y.view(*d.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, low, weight, a, b = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        grad_low = (grad @ b).mul_(ctx.scale)
        grad_d = grad_given = None
        if ctx.whole and ctx.needs_input_grad[0]:
            grad_d = (grad @ weight).addmm_(grad_low, a).view(ctx.shape)
        if not ctx.whole:
            grad_d = (grad_low @ a).view(ctx.shape) if ctx.needs_input_grad[0] else None
            grad_given = (grad @ weight).view(ctx.shape) if ctx.needs_input_grad[6] else None
        return grad_d, None, None, grad_low.t() @ flat, grad.t() @ low, None, grad_given
