"""A model laid out without weights: names, shapes and types are there, memory is not.

In: ModelConfig.  Out: a VisionLanguageModel on the meta device, to be filled by assignment.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.nn import init
from torch.overrides import TorchFunctionMode

from tessella.config import ModelConfig
from tessella.model.vision_language import VisionLanguageModel

FILLING = (init.normal_, init.uniform_, init.kaiming_uniform_, torch.Tensor.normal_, torch.Tensor.uniform_)


class _NoChance(TorchFunctionMode):
    """Passes over random filling. On the meta device it would fill nothing, but import torch._dynamo: 0.9 s and 78 MB a start."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func in FILLING:
            return args[0] if args else named["tensor"]  # torch.nn.init hands its tensor on by name
        return (torch.empty if func is torch.randn else func)(*args, **named)


def blank_model(config: ModelConfig) -> VisionLanguageModel:
    """The model of that config with every parameter on the meta device."""
    with torch.device("meta"), _NoChance():
        return VisionLanguageModel(config)
