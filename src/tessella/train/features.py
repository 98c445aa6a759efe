"""What frozen parts say is computed once and kept: of a tile, or of a whole row.

In: keys, and a function that computes what is not kept.  Out: the tensors, in the order of the keys.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from tessella.model.device import free_bytes

SHARE_OF_FREE = 0.25  # of the device's free memory that may be taken


class Kept:
    """Tensors by key, up to max_bytes; beyond that they are computed each time.

    at_once: how many are computed together. A matrix product's last bits depend on how many rows it has, so only one at a
    time is the same in whatever company it was computed, and a resumed run bit-identical. On the CPU that costs nothing: one
    tile is hundreds of rows. On a GPU batches are much faster, and there bit-identity is not promised.
    """

    def __init__(self, device: torch.device, *, at_once: int = 1, max_bytes: int | None = None, keep: bool = True):
        self.at_once, self.keep = at_once, keep
        self.max_bytes = int(SHARE_OF_FREE * free_bytes(device)) if max_bytes is None else max_bytes
        self.kept: dict[str, Tensor] = {}
        self.num_bytes = 0
        self.computed = 0

    def __call__(self, keys: Sequence[str], compute: Callable[[list[int]], Iterable[Tensor]]) -> list[Tensor]:
        """compute: places in keys -> their tensors, without gradients; each key is asked for once."""
        new = {key: place for place, key in enumerate(keys) if key not in self.kept}
        fresh: dict[str, Tensor] = {}
        wanted = list(new.items())
        for start in range(0, len(wanted), self.at_once):
            part = wanted[start : start + self.at_once]
            with torch.no_grad():
                said = compute([place for _, place in part])
            self.computed += len(part)
            fresh |= {key: one for (key, _), one in zip(part, said, strict=True)}
        together = [fresh[key] if key in fresh else self.kept[key] for key in keys]
        for key, one in fresh.items():
            size = one.numel() * one.element_size()
            if self.keep and self.num_bytes + size <= self.max_bytes:
                self.kept[key] = one.clone()  # its own memory: a view would keep the whole batch alive
                self.num_bytes += size
        return together


def chosen(tiles: Tensor, places: list[int]) -> Tensor:
    """tiles[places]. Side by side they stay a slice of page-locked memory, from which a GPU copies while it computes."""
    first, end = places[0], places[-1] + 1
    return tiles[first:end] if places == list(range(first, end)) else tiles[places]
