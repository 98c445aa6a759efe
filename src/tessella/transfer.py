"""Numbers on their way between host and device, without making one wait for the other.

In: tensors on the CPU, or on the device.  Out: tensors on the device; Arrival, numbers on the CPU as soon as they are there.
On a CPU both are the tensor itself.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def sent(x: Tensor, device: torch.device) -> Tensor:
    """x on the device. To a GPU through pinned memory: from any other, the copy would wait for all that was launched before.

    Torch's own allocator keeps the pinned memory until the copy is done.
    """
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def sent_together(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    """Tensors of one shape, stacked and sent; copied once on the way."""
    if device.type != "cuda":
        return torch.stack(list(parts)).to(device)
    whole = torch.empty((len(parts), *parts[0].shape), dtype=parts[0].dtype, pin_memory=True)
    return torch.stack(list(parts), out=whole).to(device, non_blocking=True)


class Arrival:
    """x on its way to the host; later work on the device does not delay it."""

    def __init__(self, x: Tensor):
        self._event: torch.cuda.Event | None = None
        if x.device.type == "cuda":
            self._there = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self._there.copy_(x, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._there = x.cpu().clone()

    def wait(self) -> Tensor:
        """The numbers, on the CPU. The thread sleeps until they are there, and lets others run."""
        if self._event is not None:
            self._event.synchronize()
        return self._there
