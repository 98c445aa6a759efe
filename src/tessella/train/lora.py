"""Which parameters learn: LoRA through PEFT beside linear layers, or whole parts; the rest is frozen.

In: a model and a recipe.  Out: Taught: the learning parameters by their name in an adapter file.
T tokens, I inputs, O outputs of a linear layer, r rank: A (r, I), B (O, r); y = W x + s B A x, s = alpha / r.
Source: arXiv:2106.09685; huggingface/peft.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from tessella.errors import ConfigError
from tessella.model.vision_language import VisionLanguageModel
from tessella.train.recipe import Recipe

PARTS = {"language": "language_model.", "tower": "vision_model.", "projector": "mlp1."}
NAME = "default"  # PEFT's name of the one adapter; not in the file
LAYERS = "language_model.model.layers."


@dataclass(frozen=True)
class Taught:
    """The learning parameters. Names are those of an adapter file: ours, and <module>.lora_A.weight."""

    parameters: dict[str, nn.Parameter]
    whole: tuple[str, ...]  # modules that are trained whole, by our names
    has_lora: bool

    def part_of(self, name: str) -> str:
        """ "language", "tower" or "projector"."""
        return next(part for part, prefix in PARTS.items() if name.startswith(prefix))

    def count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())


def prepare(model: VisionLanguageModel, recipe: Recipe) -> Taught:
    """Freeze the model, hang LoRA beside what the recipe names, and let the whole parts learn.

    Raises ConfigError when a target is no linear layer of the model.
    """
    model.requires_grad_(False)
    targets = []
    if recipe.language == "lora":
        named = linear_layers(model, LAYERS, recipe.lora_targets, "lora_targets")
        lowest = lowest_taught(model, recipe)
        targets += [name for name in named if int(name.removeprefix(LAYERS).split(".")[0]) >= lowest]
    if recipe.tower == "lora":
        targets += linear_layers(model, "vision_model.encoder.layers.", recipe.tower_lora_targets, "tower_lora_targets")
    if targets:
        config = LoraConfig(
            r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, lora_dropout=recipe.lora_dropout, target_modules=targets
        )  # fmt: skip
        config._register_custom_module({nn.Linear: LoraLinear})
        inject_adapter_in_model(config, model, adapter_name=NAME)
    whole = []
    if recipe.language == "full":
        whole.append("language_model")
    if recipe.tower == "full":
        whole.append("vision_model")
    if recipe.projector == "train":
        whole.append("mlp1")
    for name in whole:
        model.get_submodule(name).requires_grad_(True)
    learning = {file_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    return Taught(learning, tuple(whole), bool(targets))


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
            known = ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
            raise ConfigError(f'{field} names "{target}", which is no linear layer there; there are {known}')
    return [name for name in names if any(name == target or name.endswith(f".{target}") for target in targets)]


def file_name(name: str) -> str:
    """A parameter's name in the model -> its name in an adapter file."""
    return name.replace(f".{NAME}.", ".").replace(".base_layer.", ".")


class LoraLinear(PeftLinear):
    """PEFT's LoRA layer; same parameters and same result, the arithmetic in one function with fewer passes over memory.

    On 2 CPU cores PEFT's own forward spends a third of a step in scaling and adding (T, O) matrices.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged or self.disable_adapters or args or kwargs or not isinstance(self.lora_dropout[NAME], nn.Identity):
            return super().forward(x, *args, **kwargs)
        base, a, b = self.base_layer, self.lora_A[NAME].weight, self.lora_B[NAME].weight
        if not torch.is_grad_enabled():
            return F.linear(x, base.weight, base.bias) + F.linear(F.linear(x, a) * self.scaling[NAME], b)
        out: Tensor = LowRank.apply(x, base.weight, base.bias, a, b, self.scaling[NAME])  # type: ignore[no-untyped-call, unused-ignore]
        return out


class LowRank(torch.autograd.Function):
    """y = x W^T + bias + s (x A^T) B^T, W and bias frozen. The scale sits on the r-wide product, not on the O-wide one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        low = (flat @ a.t()).mul_(scale)
        y = F.linear(flat, weight, bias).addmm_(low, b.t())
        ctx.save_for_backward(flat, low, weight, a, b)
        ctx.scale, ctx.shape = scale, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, low, weight, a, b = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        grad_low = (grad @ b).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_low, a).view(ctx.shape)
        return grad_x, None, None, grad_low.t() @ flat, grad.t() @ low, None
