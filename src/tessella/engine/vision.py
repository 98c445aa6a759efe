"""Visual tokens of views that were seen, kept for all requests up to a number of bytes.

In: keys of views.  Out: visual tokens (slots, D) of one view.
"""

import hashlib
from collections import OrderedDict
from typing import NamedTuple

from torch import Tensor

from tessella.geometry import Window
from tessella.inputs import ModelInput


class View(NamedTuple):
    """What is seen, kept and shown as one: a tile, or a whole picture where its tiles are laid out together."""

    first: int  # of its tiles among those of the prompt
    tiles: int
    slots: int
    digest: str
    window: Window | None = None


def views_of(prompt: ModelInput, slots_per_tile: int) -> list[View]:
    """The views of a prompt, in the order of its slots."""
    if not prompt.windows:
        return [View(tile, 1, slots_per_tile, digest) for tile, digest in enumerate(prompt.digests)]
    views, first = [], 0
    for tiles, window in zip(prompt.tiles_per_picture, prompt.windows, strict=True):
        told = hashlib.blake2b(repr(tuple(window)).encode(), digest_size=16)
        for digest in prompt.digests[first : first + tiles]:
            told.update(digest.encode())
        views.append(View(first, tiles, slots_per_tile + window.tokens, told.hexdigest(), window))
        first += tiles
    return views


class ViewKey(NamedTuple):
    """A view as one way of seeing sees it: 0 the model's own, else the number of an adapter that changes tower or connector."""

    sight: int
    digest: str


class VisionCache:
    """Least recently used views go first. A view larger than all the room is not kept at all."""

    def __init__(self, limit_bytes: int):
        self.bytes = 0
        self._limit = limit_bytes
        self._kept: OrderedDict[ViewKey, Tensor] = OrderedDict()

    def __contains__(self, key: ViewKey) -> bool:
        return key in self._kept

    def get(self, key: ViewKey) -> Tensor:
        self._kept.move_to_end(key)
        return self._kept[key]

    def put(self, key: ViewKey, tokens: Tensor) -> None:
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
