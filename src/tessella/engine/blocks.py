"""Which cache block is whose, and what can be found again: plain book-keeping, no tensor.

In: keys of full blocks, each over everything before it.  Out: block numbers.
A block is free, idle (nobody holds it, but its content has a key and can be found again), or held by one or more rows.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence


class BlockBook:
    """Blocks 0 to count - 1, each counted by its holders; idle blocks are given away longest unused first."""

    def __init__(self, count: int):
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # longest unused first
        self._holders = [0] * count
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """Blocks that `new` could give out now."""
        return len(self._free) + len(self._idle)

    @property
    def idle(self) -> int:
        return len(self._idle)

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest run of keys from the first on that are here; nothing is taken yet."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def is_idle(self, block: int) -> bool:
        return block in self._idle

    def take(self, blocks: Sequence[int]) -> None:
        """One more holder for each of these found blocks."""
        for block in blocks:
            assert self._holders[block] or block in self._idle, f"block {block} has no content to share"
            self._idle.pop(block, None)
            self._holders[block] += 1

    def new(self) -> int:
        """A block without content for one holder; its old content, if any, can no longer be found."""
        assert self.available, "ask for `available` first"
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
        self._holders[block] = 1
        return block

    def publish(self, block: int, key: bytes) -> None:
        """The block is full and computed: whoever has this key may share it. A second block of one key stays its holder's."""
        assert self._holders[block], f"block {block} is published by nobody"
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less for each, in the order of a row; the end of a row is given away before its beginning."""
        for block in reversed(blocks):
            assert self._holders[block] > 0, f"block {block} is released twice"
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._key_of:
                self._idle[block] = None
            else:
                self._free.append(block)


def next_key(before: bytes, ids: Sequence[int], digests: Sequence[str]) -> bytes:
    """The key of one full block: of its ids, of the tiles that have slots in it, and of the key before it.

    All slots bear one id, so ids alone would mix up pictures; how far a tile reaches in is settled by what came before.
    """
    sha = hashlib.blake2b(before, digest_size=16)
    sha.update(array("q", ids).tobytes())
    for digest in digests:
        sha.update(digest.encode())
    return sha.digest()
