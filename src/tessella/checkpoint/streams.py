"""Bytes between files, a piece at a time, past the page cache where a file is large.

In: a place in a file, or pieces.  Out: pieces, or a file.
The page cache costs a processor more than the disk does: over 1 s for a GB that is written, 0.2 s past it (results/convert.md).
What is read past it comes from the disk, and so it is what was really written. Where a system or a file system does not know
how (O_DIRECT), the usual way is taken.
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np

from tessella.errors import CheckpointError

PIECE_BYTES = 4 * 2**20  # fits a processor's cache, so that what one thread has read the next ones find there
BLOCK_BYTES = 4096  # past the page cache, places, lengths and memory are multiples of this
LARGE_BYTES = 2**28  # smaller files go through the page cache, where whoever opens them next finds them


def is_large(num_bytes: int) -> bool:
    """Whether a file of that size goes past the page cache."""
    return num_bytes >= LARGE_BYTES


@dataclass(frozen=True)
class Span:
    """Bytes of a file that are a whole tensor. past_cache: read from the disk itself."""

    file: Path
    begin: int
    num_bytes: int
    name: str  # of the tensor, for messages
    past_cache: bool = False

    def pieces(self, buffers: Iterator[memoryview]) -> Iterator[memoryview]:
        """The bytes, piece by piece, each read into the next of the buffers. Raises CheckpointError when the file ends early."""
        handle, step = _opened(self.file, os.O_RDONLY, self.past_cache)
        try:
            for done in range(0, self.num_bytes, PIECE_BYTES):
                begin, wanted = self.begin + done, min(PIECE_BYTES, self.num_bytes - done)
                before = begin % step  # bytes of the block that belong to somebody else
                room = next(buffers)[: -(-(before + wanted) // step) * step]
                if read_into(handle, room, begin - before, before + wanted) < before + wanted:
                    raise CheckpointError(
                        f"{self.file} ends within {self.name}; it was changed meanwhile: fetch or write it again"
                    )
                yield room[before : before + wanted]
        finally:
            os.close(handle)


def read_into(handle: int, room: memoryview, begin: int, wanted: int) -> int:
    """Fill room from that place of a file, at least so many bytes of it; gives how many there were."""
    done = 0
    while done < wanted:  # one read gives at most 2 GiB
        try:
            got = os.preadv(handle, [room[done:]], begin + done)
        except OSError as error:
            _through_cache(handle, error)
            continue
        if not got:
            break
        done += got
    return done


def new_buffers(count: int) -> Iterator[memoryview]:
    """Room for so many pieces, given out in turn for ever; each begins at a block and has one to spare."""
    return cycle([memoryview(mmap.mmap(-1, PIECE_BYTES + BLOCK_BYTES)) for _ in range(count)])


def _opened(path: Path, flags: int, past_cache: bool) -> tuple[int, int]:
    """(handle, the number whose multiples its places and lengths must be)."""
    if past_cache and hasattr(os, "O_DIRECT"):
        try:
            return os.open(path, flags | os.O_DIRECT, 0o666), BLOCK_BYTES
        except OSError:
            pass  # the file system cannot; a fault of another kind comes again below
    return os.open(path, flags, 0o666), 1


def _through_cache(handle: int, error: OSError) -> None:
    """Some file systems open a file for what they then refuse: go on through the page cache. Another error is raised again."""
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    if error.errno != errno.EINVAL or not hasattr(os, "O_DIRECT") or not flags & os.O_DIRECT:
        raise error
    fcntl.fcntl(handle, fcntl.F_SETFL, flags & ~os.O_DIRECT)


class NewFile:
    """A file that is written from its beginning to its end, and synced when it is closed."""

    def __init__(self, path: Path, num_bytes: int):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        self._handle, self._step = _opened(path, flags, past_cache=is_large(num_bytes))
        self._room = memoryview(mmap.mmap(-1, PIECE_BYTES))
        self._filled, self._size = 0, 0

    def write(self, piece: memoryview) -> None:
        self._size += len(piece)
        if self._step == 1:
            self._put(piece)
            return
        while piece:
            taken = min(len(piece), PIECE_BYTES - self._filled)
            # numpy, because it lets other threads run meanwhile
            np.copyto(
                np.frombuffer(self._room[self._filled : self._filled + taken], np.uint8), np.frombuffer(piece[:taken], np.uint8)
            )
            self._filled, piece = self._filled + taken, piece[taken:]
            if self._filled == PIECE_BYTES:
                self._put(self._room)
                self._filled = 0

    def finish(self) -> None:
        """Bring all of it to the disk."""
        if self._filled:
            self._put(self._room[: -(-self._filled // self._step) * self._step])
            os.ftruncate(self._handle, self._size)  # the last block was written whole
        os.fsync(self._handle)

    def close(self) -> None:
        os.close(self._handle)

    def _put(self, block: memoryview) -> None:
        while block:  # one write takes at most 2 GiB
            try:
                block = block[os.write(self._handle, block) :]
            except OSError as error:
                _through_cache(self._handle, error)
