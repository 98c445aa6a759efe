"""Pictures are known again by what they show: the same one under another name, in another size, or compressed anew.

In: pictures.  Out: for each a Fingerprint: 64 bits of which of two neighbours is brighter (dHash), and 16 x 16 colours that tell
whether two of equal bits are the same picture.  Time-boxed: what the clock does not allow is left out, and counted.
"""

import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tessella.errors import ImageError
from tessella.image import Source, open_image

THREADS = 4  # decoders let go of Python's lock
SIDE = 16
MOST_BITS = 8  # of 64 that may differ; JPEG of quality 30 turned at most 7 of 60 drawings, other drawings differ in 9 and more
MOST_GREY = 8.0  # mean difference of the 16 x 16 colours, of 255; JPEG made at most 3.1, other drawings 46
MOST_ASPECT = 0.03
DECODED_PX = 64  # a JPEG is decoded at the smallest eighth that is at least as large


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """What a picture is known by."""

    bits: int
    colours: np.ndarray  # (16, 16, 3) uint8
    aspect: float  # width over height


def fingerprint(picture: Image.Image) -> Fingerprint:
    """Of an RGB picture."""
    small = picture.resize((SIDE, SIDE), Image.Resampling.BOX)
    grey = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    brighter = (grey[:, 1:] > grey[:, :-1]).reshape(-1)
    return Fingerprint(
        int("".join("1" if bit else "0" for bit in brighter), 2), np.asarray(small), picture.width / picture.height
    )


def fingerprints(sources: Iterable[Source], seconds: float, limit_megapixels: float) -> dict[Source, Fingerprint]:
    """As many as the seconds allow, in order; what cannot be opened is left out: the ledger names it."""
    distinct = list(dict.fromkeys(sources))
    found: dict[Source, Fingerprint] = {}
    deadline = time.monotonic() + seconds

    def look(source: Source) -> Fingerprint | None:
        if time.monotonic() > deadline:
            return None
        try:
            return fingerprint(open_image(source, limit_megapixels=limit_megapixels, least_px=DECODED_PX))
        except ImageError:
            return None

    with ThreadPoolExecutor(THREADS) as pool:
        for source, one in zip(distinct, pool.map(look, distinct), strict=True):
            if one is not None:
                found[source] = one
    return found


class Known:
    """Fingerprints that others are compared with, all at once."""

    def __init__(self, found: Mapping[Source, Fingerprint]):
        self.sources = list(found)
        some = list(found.values())
        self.bits = np.array([one.bits for one in some], dtype=np.uint64)
        self.aspects = np.array([one.aspect for one in some])
        self.colours = np.array([one.colours.reshape(-1) for one in some], dtype=np.uint8).reshape(len(some), SIDE * SIDE * 3)

    def same_as(self, one: Fingerprint) -> list[Source]:
        """Those that show the same picture: nearly equal bits, aspect and colours."""
        apart = np.bitwise_count(self.bits ^ np.uint64(one.bits))
        near = np.nonzero((apart <= MOST_BITS) & (np.abs(self.aspects / one.aspect - 1) < MOST_ASPECT))[0]
        colours = np.abs(self.colours[near].astype(np.int16) - one.colours.reshape(-1)).mean(axis=1)
        return [self.sources[place] for place in near[colours <= MOST_GREY]]
