"""Visual tokens of tiles that were seen, kept for all requests up to a number of bytes.

In: keys of tiles.  Out: visual tokens (slots, D) of one tile.
"""

from collections import OrderedDict
from typing import NamedTuple

from torch import Tensor


class TileKey(NamedTuple):
    """A tile as one way of seeing sees it: 0 the model's own, else the number of an adapter that changes tower or connector."""

    sight: int
    digest: str


class VisionCache:
    """Least recently used tiles go first. A tile larger than all the room is not kept at all."""

    def __init__(self, limit_bytes: int):
        self.bytes = 0
        self._limit = limit_bytes
        self._kept: OrderedDict[TileKey, Tensor] = OrderedDict()

    def __contains__(self, key: TileKey) -> bool:
        return key in self._kept

    def get(self, key: TileKey) -> Tensor:
        self._kept.move_to_end(key)
        return self._kept[key]

    def put(self, key: TileKey, tokens: Tensor) -> None:
        assert key not in self._kept
        self._kept[key] = tokens
        self.bytes += tokens.nbytes
        while self.bytes > self._limit:
            _, gone = self._kept.popitem(last=False)
            self.bytes -= gone.nbytes

    def forget(self, sight: int) -> None:
        """Drop what an adapter saw that is no longer here."""
        for key in [key for key in self._kept if key.sight == sight]:
            self.bytes -= self._kept.pop(key).nbytes
