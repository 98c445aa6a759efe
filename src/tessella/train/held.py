"""Pictures that lie in something else: a member of a tar, a cell of a parquet file or of a hub's table, a frame of a video.

In: where it lies.  Out: its encoded bytes, or for a frame the picture.  What holds it is opened again at each look, so that a
worker process can look too; of tables and videos the last few are kept open.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import IO, Any

from PIL import Image

from tessella.errors import DataError, ImageError
from tessella.geometry import Size
from tessella.image import Held

_ONE_AT_A_TIME = Lock()  # sixteen threads would each read the same row group


@dataclass(frozen=True)
class TarMember(Held):
    """A file in a tar without compression: length bytes from offset."""

    path: Path
    offset: int
    length: int
    name: str

    def open(self) -> IO[bytes]:
        try:
            with self.path.open("rb") as stream:
                stream.seek(self.offset)
                return io.BytesIO(stream.read(self.length))
        except OSError as error:
            raise ImageError(f"{self} cannot be read ({error}); check the archive") from error

    def __str__(self) -> str:
        return f"{self.path.name}/{self.name}"


@dataclass(frozen=True)
class TableCell(Held):
    """Embedded bytes in a parquet file. item: which one, where the cell holds a list."""

    path: Path
    group: int
    row: int  # within the group
    column: str
    item: int | None
    digest: str  # of the bytes: the same picture in two rows is known again
    name: str

    def open(self) -> IO[bytes]:
        with _ONE_AT_A_TIME:
            cell = _column(self.path, self.group, self.column)[self.row].as_py()
        return io.BytesIO(bytes_of(cell if self.item is None else cell[self.item]) or b"")

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class HubCell(Held):
    """Embedded bytes in a table of the `datasets` package, which maps it from the disk."""

    table: Any  # datasets.Dataset with its pictures not decoded
    row: int
    column: str
    item: int | None
    name: str

    def open(self) -> IO[bytes]:
        cell = self.table[self.row][self.column]
        return io.BytesIO(bytes_of(cell if self.item is None else cell[self.item]) or b"")

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Embedded(Held):
    """Bytes that are in memory, from a stream that does not go back."""

    raw: bytes = field(repr=False)
    name: str

    def open(self) -> IO[bytes]:
        return io.BytesIO(self.raw)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class VideoFrame(Held):
    """One of the frames that a video is shown as."""

    path: Path
    times_s: tuple[float, ...]  # of all of them
    number: int
    size: Size | None

    def open(self) -> Image.Image:
        return _frames(self.path, self.times_s)[self.number]

    def __str__(self) -> str:
        return f"{self.path}@{self.times_s[self.number]:.2f}s"


def bytes_of(cell: object) -> bytes | None:
    """The bytes in a cell {bytes, path} or of bytes alone; None when it only names a file."""
    if isinstance(cell, bytes):
        return cell
    raw = cell.get("bytes") if isinstance(cell, dict) else None
    return raw if isinstance(raw, bytes) else None


@lru_cache(maxsize=5)
def _column(path: Path, group: int, column: str) -> Any:
    import pyarrow.parquet  # the data extra; loaded where parquet is read

    return pyarrow.parquet.ParquetFile(path).read_row_group(group, columns=[column], use_threads=False).column(column)


# ---- videos


@lru_cache(maxsize=4)
def _frames(path: Path, times_s: tuple[float, ...]) -> tuple[Image.Image, ...]:
    """The frames shown at these times, upright. Raises ImageError."""
    import av  # the data extra; loaded where videos are read

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"  # many rows are read at once
            return tuple(_frame_at(container, stream, time_s) for time_s in times_s)
    except (av.FFmpegError, OSError, IndexError) as error:
        raise ImageError(f"{path} is damaged or cut off ({error}); copy or download it again") from error


def _frame_at(container: Any, stream: Any, time_s: float) -> Image.Image:
    """The last frame that begins at or before time_s; the first one where none does."""
    start = stream.start_time or 0
    container.seek(start + int(time_s / stream.time_base), stream=stream)  # to the key frame before
    shown = None
    for frame in container.decode(stream):
        if shown is not None and frame.pts is not None and (frame.pts - start) * stream.time_base > time_s:
            break
        shown = frame
    if shown is None:
        raise ImageError(f"no frame at {time_s:.2f} s")
    picture = shown.to_image().convert("RGB")
    return picture.rotate(shown.rotation, expand=True) if shown.rotation else picture


def frames_of(path: Path, count: int) -> Sequence[VideoFrame]:
    """The middle frames of `count` equal parts of a video, as InternVL shows it; fewer where it has fewer.

    Raises DataError with the reason: no such file, no video in it, PyAV missing.
    """
    try:
        import av  # the data extra; loaded where videos are read
    except ImportError as error:
        raise DataError("video: reading it needs PyAV: pip install 'tessella[data]'") from error
    if not path.is_file():
        raise DataError(f"video missing: {path}")
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            length = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / 1e6
            count = min(count, stream.frames or count)
            times = tuple(round(float(length) * (n + 0.5) / count, 4) for n in range(count))
        first = _frames(path, times)[0]
    except (av.FFmpegError, OSError, IndexError, ImageError) as error:
        raise DataError(f"video unusable: {path}: {error}") from error
    size = Size(first.width, first.height)
    return [VideoFrame(path, times, number, size) for number in range(count)]
