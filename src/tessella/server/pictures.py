"""Pictures of a request: data: URLs and, if allowed, fetched ones, become bytes that are safe to open.

In: image_url.url.  Out: encoded bytes whose header was read and whose size is within the limits.
Nothing here opens a path. Texts of errors are ours alone: a decoder's words may tell of its memory (CVE-2026-22778).
"""

import binascii
import math
import re
from collections.abc import Sequence

from tessella.errors import ImageError
from tessella.image import read_size
from tessella.server.refusal import Refusal
from tessella.server.settings import Settings

# A server opens fewer kinds than a person's own command line: each decoder more is one more to be attacked.
BEGINNINGS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"BM")
KINDS = "PNG, JPEG, WebP, GIF or BMP"
_HEAD = re.compile(r"data:image/[a-z0-9.+-]{1,32};base64,", re.IGNORECASE)


def is_data_url(url: str) -> bool:
    return url[:5].lower() == "data:"


def bytes_of_data_url(url: str, where: str) -> bytes:
    """where: the field, for messages. Raises Refusal 400 (no such URL), 422 (broken base64)."""
    head = _HEAD.match(url)
    if head is None:
        raise Refusal(400, f"{where}: a data: URL must begin like data:image/png;base64,", param=where, code="invalid_image_url")
    try:
        return binascii.a2b_base64(url[head.end() :].encode("ascii"), strict_mode=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise unreadable(where, "is no base64") from error


def check_pictures(pictures: Sequence[bytes], places: Sequence[str], settings: Settings) -> None:
    """Sizes, from the headers alone. Raises Refusal 413 (bytes), 422 (unreadable, too many pixels)."""
    total = 0.0
    for data, where in zip(pictures, places, strict=True):
        if len(data) > settings.picture_bytes:
            raise too_many_bytes(where, settings)
        if not data.startswith(BEGINNINGS) and not (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
            raise unreadable(where, f"is not {KINDS}")
        megapixels = _megapixels(data, where)
        total += megapixels
        if megapixels > settings.picture_megapixels:
            raise _too_many_pixels(f"{where} has {megapixels:.1f}", settings.picture_megapixels, where)
    if total > settings.request_megapixels:
        raise _too_many_pixels(f"the pictures have {total:.1f} together", settings.request_megapixels, None)


def _megapixels(data: bytes, where: str) -> float:
    try:
        size = read_size(data, limit_megapixels=math.inf)
    except ImageError as error:
        raise unreadable(where, "is damaged, cut off, or smaller than 2 px a side") from error
    return size.width_px * size.height_px / 1e6


def unreadable(where: str | None, what: str) -> Refusal:
    return Refusal(422, f"{where or 'a picture'} {what}; send another picture", param=where, code="invalid_image")


def too_many_bytes(where: str, settings: Settings) -> Refusal:
    limit = settings.picture_bytes / 2**20
    return Refusal(413, f"{where} has more than {limit:g} MiB; send a smaller picture", param=where, code="image_too_large")


def _too_many_pixels(what: str, limit: float, where: str | None) -> Refusal:
    return Refusal(422, f"{what} megapixels; at most {limit:g}: make it smaller", param=where, code="image_too_large")
