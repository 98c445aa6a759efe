"""Gradient checkpointing, module by module: what is named is computed again in the backward pass instead of kept.

In: a model and names such as "language" or "tower.mlp".  Out: the same model, whose named modules keep their inputs alone.
Source: arXiv:1604.06174; torch.utils.checkpoint.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tessella.model.vision_language import VisionLanguageModel

ATTENTION = {"language": "self_attn", "tower": "attn"}  # what each part calls its attention


def recompute(model: VisionLanguageModel, names: Sequence[str]) -> None:
    """Make the named modules keep nothing between the passes. Dropout draws the same again: its state is kept."""
    for name in names:
        for module in modules_of(model, name):
            object.__setattr__(module, "forward", again(module.forward))


def modules_of(model: VisionLanguageModel, name: str) -> Iterator[nn.Module]:
    """ "language" -> each layer of the decoder; "tower.mlp" -> the MLP of each layer of the tower."""
    part, _, inner = name.partition(".")
    layers = model.language_model.model.layers if part == "language" else model.vision_model.encoder.layers
    for layer in layers:
        yield layer if not inner else layer.get_submodule(ATTENTION[part] if inner == "attention" else inner)


def again(forward: Callable[..., Any]) -> Callable[..., Any]:
    """forward, computed again in the backward pass; without gradients as it was."""

    def run(*inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs)
        return checkpoint(forward, *inputs, use_reentrant=False)

    return run
