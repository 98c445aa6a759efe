"""What a frozen tower says of a tile is computed once and kept.

In: tiles (N, 3, S, S) and their digests.  Out: (N, ...) what the frozen part says of them: features, or visual tokens when the
projector is frozen too.  N tiles.
"""

from collections.abc import Callable, Sequence

import psutil
import torch
from torch import Tensor

SHARE_OF_FREE = 0.25  # of the device's free memory that the cache may take
TILES_AT_ONCE = 64


class FeatureCache:
    """Keeps the answers of a frozen module by tile digest, up to max_bytes; beyond that they are computed each time.

    alone: run each tile by itself. A matrix product's last bits depend on how many rows it has, so only then is a feature
    the same whichever tiles were computed with it, and a resumed run bit-identical. On the CPU this costs nothing: one tile
    is hundreds of rows. On a GPU batches are much faster, and there bit-identity is not promised.
    """

    def __init__(
        self, compute: Callable[[Tensor], Tensor], device: torch.device, *, max_bytes: int | None = None, keep: bool = True
    ):
        self.compute, self.device, self.keep = compute, device, keep
        self.alone = device.type == "cpu"
        self.max_bytes = int(SHARE_OF_FREE * free_bytes(device)) if max_bytes is None else max_bytes
        self.kept: dict[str, Tensor] = {}
        self.num_bytes = 0
        self.computed = 0  # tiles that went through the tower

    def __call__(self, tiles: Tensor, digests: Sequence[str]) -> Tensor:
        """tiles (N, 3, S, S) uint8, N >= 1 -> (N, ...)."""
        new = {digest: index for index, digest in enumerate(digests) if digest not in self.kept}  # each digest once
        fresh: dict[str, Tensor] = {}
        wanted = list(new.items())
        for start in range(0, len(wanted), 1 if self.alone else TILES_AT_ONCE):
            part = wanted[start : start + (1 if self.alone else TILES_AT_ONCE)]
            with torch.no_grad():
                # Without repeats a slice stays in page-locked memory, from which a GPU copies while it computes.
                all_new = len(wanted) == len(tiles)
                chosen = tiles[start : start + len(part)] if all_new else tiles[[index for _, index in part]]
                said = self.compute(chosen.to(self.device, non_blocking=True))
            self.computed += len(part)
            fresh |= {digest: one for (digest, _), one in zip(part, said, strict=True)}
        together = torch.stack([fresh[digest] if digest in fresh else self.kept[digest] for digest in digests])
        for digest, one in fresh.items():
            size = one.numel() * one.element_size()
            if self.keep and self.num_bytes + size <= self.max_bytes:
                self.kept[digest] = one.clone()  # its own memory: a view would keep the whole batch alive
                self.num_bytes += size
        return together


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)
