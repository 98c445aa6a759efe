"""Bytes between files, a piece at a time, past the page cache where a file is large.

In: places in files, or bytes in memory.  Out: pieces in order, or a file.
A disk is at its fastest when it always has something to do next: pieces are read several at once, ahead of their turn.
The page cache costs a processor more than the disk does: over 1 s for a GB that is written, 0.2 s past it (results/convert.md).
What is read past it comes from the disk, and so it is what was really written. Where a system or a file system does not know
how (O_DIRECT), the usual way is taken.
"""

import errno
import fcntl
import mmap
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import numpy as np

from tessella.errors import CheckpointError

PIECE_BYTES = 4 * 2**20  # fits a processor's cache, so that what one thread has read the next ones find there
BLOCK_BYTES = 4096  # past the page cache, places, lengths and memory are multiples of this
READERS = 3  # pieces that are read at once
LARGE_BYTES = 2**28  # smaller files go through the page cache, where whoever opens them next finds them


def is_large(num_bytes: int) -> bool:
    """Whether a file of that size goes past the page cache."""
    return num_bytes >= LARGE_BYTES


def is_hollow(file: Path) -> bool:
    """Whether a large file is mostly holes. They cost nothing to read past the page cache, and 1 s a GB through it."""
    status = file.stat()
    return is_large(status.st_size) and 2 * 512 * status.st_blocks < status.st_size


@dataclass(frozen=True)
class Span:
    """Bytes that lie together in a file. past_cache: read from the disk itself."""

    file: Path
    begin: int
    num_bytes: int
    name: str  # of the tensor, for messages
    past_cache: bool = False

    def part(self, begin: int, num_bytes: int) -> "Span":
        """Some of them, counted from the first."""
        assert 0 <= begin <= begin + num_bytes <= self.num_bytes, f"{begin} + {num_bytes} of {self}"
        return replace(self, begin=self.begin + begin, num_bytes=num_bytes)


@dataclass(frozen=True)
class Strips:
    """The bytes of a tensor as they lie in files, row after row: in one span, or in several. Rows are taken as a tensor's are."""

    spans: tuple[Span, ...]
    rows: int

    @property
    def num_bytes(self) -> int:
        return sum(span.num_bytes for span in self.spans)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, wanted: slice) -> "Strips":
        first, last, step = wanted.indices(self.rows)
        assert step == 1 and first <= last
        row_bytes = self.num_bytes // max(1, self.rows)
        left, right = first * row_bytes, last * row_bytes  # counted from the first byte of the span
        spans = []
        for span in self.spans:
            begin, end = max(0, left), min(span.num_bytes, right)
            if begin < end:
                spans.append(span.part(begin, end - begin))
            left, right = left - span.num_bytes, right - span.num_bytes
        return Strips(tuple(spans), last - first)


def joined(parts: Sequence[Strips]) -> Strips:
    """One tensor of the rows of several."""
    return Strips(tuple(span for part in parts for span in part.spans), sum(part.rows for part in parts))


def from_disk(strips: Strips) -> Strips:
    """The same, read past the page cache where the file is large."""
    sizes = {span.file: span.file.stat().st_size for span in strips.spans}
    return replace(strips, spans=tuple(replace(span, past_cache=is_large(sizes[span.file])) for span in strips.spans))


def side_by_side(a: Strips, b: Strips) -> Iterator[tuple[Span, Span]]:
    """Two of one size, cut at the same places."""
    assert a.num_bytes == b.num_bytes
    left, right = ([span for span in reversed(strips.spans) if span.num_bytes] for strips in (a, b))
    while left:
        one, other = left.pop(), right.pop()
        size = min(one.num_bytes, other.num_bytes, PIECE_BYTES)
        yield one.part(0, size), other.part(0, size)
        left += [one.part(size, one.num_bytes - size)] if size < one.num_bytes else []
        right += [other.part(size, other.num_bytes - size)] if size < other.num_bytes else []


def pieces(sources: Iterable[Span | memoryview], stand: int) -> Generator[memoryview, None, None]:
    """The bytes of all, one after another, in pieces of at most PIECE_BYTES. A piece stands until so many others were asked for.

    Raises CheckpointError when a file ends early.
    """
    rooms = cycle([memoryview(mmap.mmap(-1, PIECE_BYTES + BLOCK_BYTES)) for _ in range(READERS + stand)])
    ahead: deque[Future[memoryview] | memoryview] = deque()
    with _Files() as files, ThreadPoolExecutor(READERS) as pool:
        for bit in _cut(sources):
            ahead.append(bit if isinstance(bit, memoryview) else pool.submit(_read, bit, *files.opened(bit), next(rooms)))
            if len(ahead) > READERS:
                yield _come(ahead.popleft())
        while ahead:
            yield _come(ahead.popleft())


def _cut(sources: Iterable[Span | memoryview]) -> Iterator[Span | memoryview]:
    for source in sources:
        size = len(source) if isinstance(source, memoryview) else source.num_bytes
        for begin in range(0, size, PIECE_BYTES):
            end = min(begin + PIECE_BYTES, size)
            yield source[begin:end] if isinstance(source, memoryview) else source.part(begin, end - begin)


def _come(piece: Future[memoryview] | memoryview) -> memoryview:
    return piece if isinstance(piece, memoryview) else piece.result()


def _read(span: Span, handle: int, step: int, room: memoryview) -> memoryview:
    before = span.begin % step  # bytes of the block that belong to somebody else
    wanted = before + span.num_bytes
    if read_into(handle, room[: -(-wanted // step) * step], span.begin - before, wanted) < wanted:
        raise CheckpointError(f"{span.file} ends within {span.name}; it was changed meanwhile: fetch or write it again")
    return room[before:wanted]


class _Files:
    """The files that are read from, each opened once."""

    def __init__(self) -> None:
        self._handles: dict[tuple[Path, bool], tuple[int, int]] = {}

    def opened(self, span: Span) -> tuple[int, int]:
        key = (span.file, span.past_cache)
        if key not in self._handles:
            self._handles[key] = _opened(span.file, os.O_RDONLY, span.past_cache)
        return self._handles[key]

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: object) -> None:
        for handle, _step in self._handles.values():
            os.close(handle)


def read_into(handle: int, room: memoryview, begin: int, wanted: int) -> int:
    """Fill room from that place of a file, at least so many bytes of it; gives how many there were."""
    done, refused = 0, False
    while done < wanted:  # one read gives at most 2 GiB
        try:
            got = os.preadv(handle, [room[done:]], begin + done)
        except OSError as error:
            _through_cache(handle, error, again=refused)
            refused = True
            continue
        if not got:
            break
        done += got
    return done


def _opened(path: Path, flags: int, past_cache: bool) -> tuple[int, int]:
    """(handle, the number whose multiples its places and lengths must be)."""
    if past_cache and hasattr(os, "O_DIRECT"):
        try:
            return os.open(path, flags | os.O_DIRECT, 0o666), BLOCK_BYTES
        except OSError:
            pass  # the file system cannot; a fault of another kind comes again below
    return os.open(path, flags, 0o666), 1


def _through_cache(handle: int, error: OSError, *, again: bool) -> None:
    """Some file systems open a file for what they then refuse: go on through the page cache.

    Another error, or the same again, is raised again. (Several threads may meet the first refusal of one handle.)
    """
    if error.errno != errno.EINVAL or again or not hasattr(os, "O_DIRECT"):
        raise error
    fcntl.fcntl(handle, fcntl.F_SETFL, fcntl.fcntl(handle, fcntl.F_GETFL) & ~os.O_DIRECT)


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
        refused = False
        while block:  # one write takes at most 2 GiB
            try:
                block = block[os.write(self._handle, block) :]
            except OSError as error:
                _through_cache(self._handle, error, again=refused)
                refused = True
