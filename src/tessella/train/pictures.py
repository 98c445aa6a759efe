"""Thousands of pictures are looked at in seconds: their sizes from the headers, their ends for signs of being cut off.

In: paths and data: URIs.  Out: for each its size, or the reason why it cannot be used.
"""

import io
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from PIL import Image

from tessella.errors import ImageError
from tessella.geometry import Size
from tessella.image import LIMIT_MEGAPIXELS, Held, name_of, open_image, read_size

Found = str | Path | Held
THREADS = 16  # mostly waiting for the disk
TAIL_BYTES = 4096
FEW = 1000  # pictures that are decoded in seconds


def examine_pictures(
    sources: Iterable[Found], *, decode: bool | None = False, limit_megapixels: float = LIMIT_MEGAPIXELS
) -> dict[Found, Size | str]:
    """Each source, looked at once -> its upright size, or a reason "kind: detail".

    Without decode only headers and file ends are read; what looks cut off is decoded to be sure. With decode every pixel is;
    None: where there are few pictures.
    """
    distinct = list(dict.fromkeys(sources))
    if decode is None:
        decode = len(distinct) <= FEW
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda source: _examine(source, decode, limit_megapixels), distinct, chunksize=8)
        return dict(zip(distinct, found, strict=True))


def _examine(source: Found, decode: bool, limit_megapixels: float) -> Size | str:
    if isinstance(source, Path) and not os.path.exists(source):  # Path.exists would raise for a name that is too long
        return f"picture missing: {name_of(source)}"
    try:
        size = read_size(source, limit_megapixels=limit_megapixels)
        if decode or isinstance(source, str) or seems_cut_off(source):
            open_image(source, limit_megapixels=limit_megapixels)
    except ImageError as error:
        return f"picture unusable: {error}"
    return size


def seems_cut_off(source: Path | Held) -> bool:
    """True when the file lacks the end that its format should have: a suspicion, some sound files have odd ends."""
    if isinstance(source, Held) and source.size is not None:
        return False  # it was decoded to learn its size
    try:
        with source.open() if isinstance(source, Held) else source.open("rb") as stream:
            return not isinstance(stream, Image.Image) and _lacks_its_end(stream)
    except OSError:
        return True  # open_image names the fault


def _lacks_its_end(stream: IO[bytes]) -> bool:
    head = stream.read(16)
    length = stream.seek(0, io.SEEK_END)
    stream.seek(-min(TAIL_BYTES, length), os.SEEK_END)
    tail = stream.read()
    if head.startswith(b"RIFF"):
        return int.from_bytes(head[4:8], "little") + 8 > length
    if head.startswith(b"\x89PNG"):
        return b"IEND" not in tail
    if head.startswith(b"\xff\xd8\xff"):
        return b"\xff\xd9" not in tail
    if head.startswith(b"GIF8"):
        return b"\x3b" not in tail[-16:]
    return True  # formats without a known end are rare enough to be decoded
