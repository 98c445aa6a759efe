"""Small shipped weights: matrices as int8 with one scale a row, the rest in half precision.

In: a state dict of float tensors.  Out: a state dict that is a quarter of the size, and back.
A matrix (2-D) or convolution (4-D) W (O, …) becomes W as int8 and "W.scale" (O,) float32: W = int8 * scale; the largest
number of a row is 127 steps, so the error is at most 1/254 of it. Other tensors become float16, or stay float32 where
float16 would lose more than one part in a thousand of the tensor's largest number.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tessella.checkpoint.weights import Weights, entries_of, write_file
from tessella.errors import CheckpointError

SCALE = ".scale"


def pack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float tensors -> packed tensors. Raises CheckpointError for numbers that are not finite."""
    packed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        wide = tensor.detach().to("cpu", torch.float32)
        if not bool(torch.isfinite(wide).all()):
            raise CheckpointError(f"{name} holds numbers that are not finite; the training that made it went wrong")
        if wide.dim() in (2, 4):
            scale = wide.flatten(1).abs().amax(1) / 127
            divisor = torch.where(scale > 0, scale, 1.0).reshape(-1, *[1] * (wide.dim() - 1))
            packed[name] = (wide / divisor).round().clamp(-127, 127).to(torch.int8)
            packed[name + SCALE] = scale
        else:
            half = wide.half()
            exact_enough = (half.float() - wide).abs().max() <= 1e-3 * wide.abs().max()
            packed[name] = half if bool(exact_enough) else wide
    return packed


def unpack(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Packed tensors -> float32 tensors. Raises CheckpointError when a matrix has no scale or a scale no matrix."""
    state: dict[str, Tensor] = {}
    for name, tensor in packed.items():
        if name.endswith(SCALE):
            if name.removesuffix(SCALE) not in packed:
                raise CheckpointError(f"packed weights hold {name} without its matrix; fetch the file again")
        elif tensor.dtype == torch.int8:
            if name + SCALE not in packed:
                raise CheckpointError(f"packed weights hold the matrix {name} without {name}{SCALE}; fetch the file again")
            state[name] = tensor.float() * packed[name + SCALE].float().reshape(-1, *[1] * (tensor.dim() - 1))
        else:
            state[name] = tensor.float()
    return state


def write_packed(path: Path, state: Mapping[str, Tensor]) -> int:
    """Pack a state dict into one safetensors file; gives its size in bytes."""
    write_file(path, entries_of(pack(state)))
    return path.stat().st_size


def read_packed(path: Path) -> dict[str, Tensor]:
    """Read one packed file -> float32 state dict. Raises CheckpointError."""
    weights = Weights([path])
    return unpack({name: weights[name] for name in weights.files})
