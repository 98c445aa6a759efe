"""A picture becomes tiles: opened safely, brought to RGB, laid on the grid that fits it best, cut; the one home of the tile rule.

In: a path, bytes, a data: URI, a PIL picture or a Held one, and a TileRule.  Out: Tiles.
pixels (N, 3, S, S) uint8, row by row, the thumbnail last.  N tiles, S side of a tile in pixels.
Source of rule and numbers: dynamic_preprocess and build_transform of OpenGVLab/InternVL at 2410d1d, internvl/train/dataset.py.
LLaVA's rules beside it: "pad" lays the picture on a square, "anyres" on the roomiest of some grids (geometry.py).
"""

import base64
import binascii
import hashlib
import io
import re
import struct
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO
from urllib.parse import unquote_to_bytes

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tessella.bands import each, resized, threads_for
from tessella.errors import ConfigError, ImageError
from tessella.geometry import UNCUT, Grid, Size, Window, fitted, roomiest_grid, window_of
from tessella.transfer import sent

MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB in [0, 1]
STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
STATISTICS = {"imagenet": (MEAN, STD), "clip": (CLIP_MEAN, (0.26862954, 0.26130258, 0.27577711))}
MOST_TILES = 40
LEAST_SIDE_PX = 2
LIMIT_MEGAPIXELS = 100.0
# Only these are ever handed to a decoder: EPS would start Ghostscript, ICO and ICNS hide a second picture behind their header.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000")
READABLE = "PNG, JPEG, WebP, GIF, BMP, TIFF, PPM, AVIF or JPEG 2000"


class Held(ABC):
    """A picture that lies in something else: a member of an archive, a cell of a table, a frame of a video."""

    size: Size | None = None  # of the upright picture, where it is known without opening

    @abstractmethod
    def open(self) -> IO[bytes] | Image.Image:
        """The encoded picture, or an RGB picture. Raises ImageError when what holds it cannot be read."""

    @abstractmethod
    def __str__(self) -> str:
        """Where it lies, for messages."""


Source = str | Path | bytes | Image.Image | Held

_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's parsers and decoders raise on damaged bytes. OSError holds UnidentifiedImageError.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, OverflowError, struct.error, zlib.error)
_BEGINNINGS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*", b"\x00\x00\x00\x0cjP  ")
_BOMB_LOCK = threading.Lock()


@dataclass(frozen=True)
class TileRule:
    """How a picture may be cut; thumbnail adds the whole picture as a last tile when there is more than one.

    kind: "closest" is InternVL's; "stretch" and "pad" make one tile, as it comes or with its own aspect on a square; "anyres"
    chooses from grids of at most max_tiles, pads with black, and puts the whole picture first.
    """

    size_px: int = 448
    min_tiles: int = 1
    max_tiles: int = 12  # without the thumbnail, 1 to 40
    thumbnail: bool = True
    kind: str = "closest"
    grids: tuple[Grid, ...] = ()

    def __post_init__(self) -> None:
        if self.size_px < 1:
            raise ConfigError(f"tile size is {self.size_px} px, must be at least 1")
        if not 1 <= self.min_tiles <= self.max_tiles <= MOST_TILES:
            raise ConfigError(
                f"tiles run from {self.min_tiles} to {self.max_tiles}; "
                f"must be 1 <= min <= max <= {MOST_TILES}: change --max-tiles"
            )


@dataclass(frozen=True, eq=False)
class Tiles:
    """One picture, cut. pixels (N, 3, S, S) uint8; digests: sha256 of each tile's pixels, so that equal tiles are known again."""

    pixels: Tensor
    grid: Grid  # of no tiles where "anyres" shows the picture whole alone
    width_px: int  # of the upright picture, before the cut
    height_px: int
    digests: tuple[str, ...]
    whole: int | None  # place of the whole picture among the tiles, None where it is no tile of its own

    @property
    def about(self) -> str:
        """How it was cut, in words."""
        cut = f"{self.grid.columns} x {self.grid.rows} tiles"
        if self.whole is None:
            return cut
        return "shown whole" if self.grid == UNCUT else f"{cut} and {'a thumbnail' if self.whole else 'the whole picture'}"


# ---- the tile rule


@cache
def candidate_grids(rule: TileRule) -> tuple[Grid, ...]:
    """Every grid of min_tiles to max_tiles tiles, fewer tiles first, then fewer columns; 35 for 1 to 12.

    The official code sorts a set by area, so within one area its order is that of a hash table. With min_tiles 1 that never
    decides; with min_tiles near max_tiles it can (1x9 or 3x3 only, exact tie), and there we follow transformers' order.
    """
    most = rule.max_tiles
    grids = [Grid(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if rule.min_tiles <= i * j <= most]
    return tuple(sorted(grids, key=lambda grid: grid.columns * grid.rows))


def choose_grid(width_px: int, height_px: int, rule: TileRule) -> Grid:
    """The grid whose aspect ratio is nearest to the picture's.

    Of equally near grids (2x1 and 4x2) the larger wins when the picture covers more than half of its pixels.
    The division stays in floats, as published, so that ties fall as they fell in training.
    """
    aspect = width_px / height_px
    area_px = width_px * height_px
    if rule.kind in ("pad", "stretch"):
        return Grid(1, 1)
    if rule.kind == "anyres":
        return roomiest_grid(Size(width_px, height_px), _allowed(rule), rule.size_px)
    best, best_gap = Grid(1, 1), float("inf")
    for grid in candidate_grids(rule):
        gap = abs(aspect - grid.columns / grid.rows)
        if gap < best_gap:
            best, best_gap = grid, gap
        elif gap == best_gap and area_px > 0.5 * rule.size_px * rule.size_px * grid.columns * grid.rows:
            best = grid
    return best


def _allowed(rule: TileRule) -> list[Grid]:
    return [grid for grid in rule.grids if grid.columns * grid.rows <= rule.max_tiles]


def count_tiles(width_px: int, height_px: int, rule: TileRule) -> int:
    """Tiles of a picture of this size, the whole picture counted where it is one of them."""
    grid = choose_grid(width_px, height_px, rule)
    tiles = grid.columns * grid.rows
    if rule.kind == "anyres":
        return tiles + 1
    return tiles + (1 if rule.kind == "closest" and rule.thumbnail and tiles > 1 else 0)


def picture_window(width_px: int, height_px: int, rule: TileRule, patches_per_side: int) -> Window | None:
    """What of the map of patches shows the picture; None for the rules that do not pad a grid."""
    if rule.kind != "anyres":
        return None
    return window_of(Size(width_px, height_px), choose_grid(width_px, height_px, rule), patches_per_side)


def cut_tiles(image: Image.Image, rule: TileRule) -> Tiles:
    """RGB picture -> its tiles row by row, resized bicubically once; the whole picture last, or first under "anyres"."""
    assert image.mode == "RGB", f"cut_tiles wants RGB, got {image.mode}; open_image makes it"
    side = rule.size_px
    grid = choose_grid(image.width, image.height, rule)
    tiles = grid.columns * grid.rows
    total = count_tiles(image.width, image.height, rule)
    whole = None if total == tiles else 0 if rule.kind == "anyres" else tiles
    pixels = np.empty((total, 3, side, side), dtype=np.uint8)
    threads = threads_for(max(image.width, side * grid.columns), max(image.height, side * grid.rows))
    laid = image if grid == UNCUT else _laid(image, rule, Size(side * grid.columns, side * grid.rows), threads)
    small = None if whole is None else resized(image, side, side, threads)

    def put(tile: int) -> str:
        """One by one: a whole large picture as one array took twice as long."""
        row, column = divmod(tile - (whole == 0), grid.columns or 1)
        box = side * column, side * row, side * (column + 1), side * (row + 1)
        shown = small if small is not None and tile == whole else laid.crop(box)
        pixels[tile] = np.asarray(shown).transpose(2, 0, 1)
        return hashlib.sha256(pixels[tile].data).hexdigest()

    digests = tuple(each(put, range(total), threads))
    return Tiles(torch.from_numpy(pixels), grid, image.width, image.height, digests, whole)


def _laid(image: Image.Image, rule: TileRule, room: Size, threads: int) -> Image.Image:
    """The picture as large as its grid: stretched, or with its own aspect on a ground."""
    if rule.kind in ("closest", "stretch"):
        return resized(image, *room, threads)  # aspect not kept, as trained
    if rule.kind == "pad":  # first padded with the mean colour, then made smaller
        ground = tuple(int(255 * mean) for mean in CLIP_MEAN)
        return _on_ground(image, Size(max(image.size), max(image.size)), ground).resize(room, Image.Resampling.BICUBIC)
    size = fitted(Size(image.width, image.height), room)
    return _on_ground(image.resize(size, Image.Resampling.BICUBIC), room, (0, 0, 0))


def _on_ground(image: Image.Image, room: Size, colour: tuple[int, ...]) -> Image.Image:
    """The picture in the middle of a ground."""
    if image.size == room:
        return image
    ground = Image.new("RGB", room, colour)
    ground.paste(image, ((room.width_px - image.width) // 2, (room.height_px - image.height) // 2))
    return ground


def normalise(tiles: Tensor, dtype: torch.dtype, statistics: str = "imagenet") -> Tensor:
    """uint8 (N, 3, S, S) -> dtype, (x / 255 - mean) / std in float32; float tiles are taken as normalised and only cast.

    statistics: a name in STATISTICS.
    """
    if tiles.is_floating_point():
        return tiles.to(dtype)
    mean, std = (sent(torch.tensor(three), tiles.device).view(3, 1, 1) for three in STATISTICS[statistics])
    return tiles.to(torch.float32).div_(255).sub_(mean).div_(std).to(dtype)


# ---- opening


def open_image(source: Source, *, limit_megapixels: float = LIMIT_MEGAPIXELS, least_px: int | None = None) -> Image.Image:
    """Path, bytes, "data:" URI or PIL picture -> an upright, whole RGB picture; of an animation the first frame.

    The size in the header is checked before a pixel is decoded. Opaque pictures equal Pillow's convert("RGB"), as in the
    official code; where there is real transparency the picture is laid on white (convert would show hidden colours).
    least_px: for a quick look, a JPEG may come smaller, by eighths, but not below so many pixels a side.
    Raises ImageError: missing, not a picture, damaged or cut off, under 2 px or over limit_megapixels.
    """
    name = name_of(source)
    with _opened(source, name) as image:
        _check_size(image, name, limit_megapixels)
        turn = _TURNS.get(_orientation(image))
        if least_px is not None and not isinstance(source, Image.Image):
            image.draft(None, (least_px, least_px))
        try:
            image.load()
            rgb = _to_rgb(image, name)
        except (*_DAMAGE, Image.DecompressionBombError) as error:
            raise ImageError(f"{name} is damaged or cut off ({error}); copy or download it again") from error
        except MemoryError as error:
            raise ImageError(f"{name}, {_measure(image)}, does not fit into memory; make it smaller") from error
    return rgb if turn is None else rgb.transpose(turn)


def read_size(source: Source, *, limit_megapixels: float = LIMIT_MEGAPIXELS) -> Size:
    """The upright size, from the header alone. Raises ImageError as open_image does, but sees no damage behind the header."""
    if isinstance(source, Held) and source.size is not None:
        return source.size
    name = name_of(source)
    with _opened(source, name) as image:
        _check_size(image, name, limit_megapixels)
        turned = _orientation(image) >= 5
        return Size(image.height, image.width) if turned else Size(image.width, image.height)


def name_of(source: Source) -> str:
    """What a message calls this source."""
    if isinstance(source, Image.Image):
        return f"the given {source.mode} picture"
    if isinstance(source, bytes):
        return f"the picture of {len(source):,} bytes"
    text = str(source) or '""'
    return text if len(text) <= 120 else f"{text[:80]}… ({len(text):,} characters)"


@contextmanager
def _opened(source: Source, name: str) -> Iterator[Image.Image]:
    """The header read, nothing decoded; a file that we opened is closed again. Raises ImageError."""
    if isinstance(source, Image.Image):
        yield source
        return
    stream = source.open() if isinstance(source, Held) else _stream(source, name)
    if isinstance(stream, Image.Image):
        yield stream
        return
    with stream:
        image = _parse_header(stream, name)
        with image:
            yield image


def _stream(source: str | Path | bytes, name: str) -> IO[bytes]:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return io.BytesIO(_data_uri(source, name))
    if re.match(r"https?:/", str(source), re.IGNORECASE):  # one slash: a Path folds the second away
        raise ImageError(f"{name} is a web address; nothing is fetched from the web: download it and give the file")
    try:
        return Path(source).expanduser().open("rb")
    except FileNotFoundError as error:
        raise ImageError(f"{name}: no such file; check the path") from error
    except IsADirectoryError as error:
        raise ImageError(f"{name} is a folder; give one picture in it") from error
    except (OSError, ValueError, RuntimeError) as error:  # no permission, name too long, NUL in the name, unknown ~user
        raise ImageError(f"{name} cannot be opened ({error}); check path and permissions") from error


def _data_uri(text: str, name: str) -> bytes:
    """Source: RFC 2397."""
    head, comma, body = text.partition(",")
    if not comma:
        raise ImageError(f"{name} has no comma, must be data:image/png;base64,… ; encode the picture again")
    raw = unquote_to_bytes(body)
    if not head.lower().endswith(";base64"):
        return raw
    try:
        return base64.b64decode(b"".join(raw.split()), validate=True)
    except binascii.Error as error:
        raise ImageError(f"{name}: broken base64 ({error}); encode the picture again") from error


@cache
def _readable_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(known for known in FORMATS if known in Image.OPEN)  # AVIF and JPEG 2000 are missing from some builds


def _parse_header(stream: IO[bytes], name: str) -> Image.Image:
    formats = _readable_formats()
    try:
        with _BOMB_LOCK:  # Pillow's own limit warns or raises without the name; ours, checked next, stands in its place
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                return Image.open(stream, formats=formats)
            finally:
                Image.MAX_IMAGE_PIXELS = limit
    except _DAMAGE as error:
        stream.seek(0)
        raise ImageError(f"{name} {_why_unreadable(stream.read(512))}; give a {READABLE} file") from error


def _why_unreadable(head: bytes) -> str:
    if not head:
        return "is empty (0 bytes)"
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"):
        return "is a HEIC picture, which we cannot read"
    if b"<svg" in head.lower():
        return "is an SVG drawing, which we cannot read"
    if head.startswith(_BEGINNINGS) or head[4:12] in (b"ftypavif", b"ftypavis"):
        return "begins like a picture, but its header is damaged or cut off"
    return "is not a picture that we can read"


def _check_size(image: Image.Image, name: str, limit_megapixels: float) -> None:
    if min(image.size) < LEAST_SIDE_PX:
        raise ImageError(f"{name} is {_measure(image)}; at least {LEAST_SIDE_PX} px a side: give a larger picture")
    megapixels = image.width * image.height / 1e6
    if megapixels > limit_megapixels:
        raise ImageError(
            f"{name} is {_measure(image)} = {megapixels:,.1f} megapixels; at most {limit_megapixels:g}: "
            "make it smaller, or raise the limit (--limit-megapixels)"
        )


def _measure(image: Image.Image) -> str:
    return f"{image.width:,} x {image.height:,} px"


def _orientation(image: Image.Image) -> int:
    """EXIF (or XMP) orientation 1 to 8, from what precedes the pixels; 1 for none or a senseless one."""
    if image.format == "TIFF":
        return 1  # Pillow turns these itself, size and pixels
    try:
        # Image.Image's own getexif: PngImageFile's would decode the whole picture to look for a chunk behind the pixels.
        value = Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
    except _DAMAGE:
        return 1  # a broken EXIF block does not make the pixels worse
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image, name)
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    if rgba.getchannel("A").getextrema() == (255, 255):
        return rgba.convert("RGB")  # from the palette itself Pillow would warn of the transparency that is not there
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _to_eight_bits(image: Image.Image, name: str) -> Image.Image:
    """16-bit grey -> L or LA by the high byte, as Pillow does for 16-bit RGB; convert("RGB") would clip it to white."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 0xFFFF:
        raise ImageError(f"{name} holds {image.mode} pixels of {values.min()} to {values.max()}; save it with 8 or 16 bits")
    grey = Image.fromarray((values.astype(np.uint16) >> 8).astype(np.uint8))
    clear = image.info.get("transparency")
    if not isinstance(clear, int):
        return grey
    alpha = Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, alpha))
