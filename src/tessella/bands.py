"""Pillow's bicubic resize and other work on pixels, on several threads: Pillow and hashlib let others run meanwhile.

In: an RGB picture and a size.  Out: the picture that Image.resize makes, to the bit.
Pillow makes every row narrower or wider by itself, rounds, and then does the same to every column; so rows can be made in bands,
and then columns. A picture of 1,792 x 1,344 px took 16 ms of CPU time for its thumbnail alone, more than the cut and all digests.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from PIL import Image

WORTH_THREADS_PX = 500_000  # pixels of a picture: below that a thread costs more than it brings
MOST_THREADS = 8
BAND_PX = 500_000
Thing = TypeVar("Thing")
Made = TypeVar("Made")


def threads_for(width_px: int, height_px: int) -> int:
    """torch's own number, which is 1 in the processes that load training's samples."""
    return min(MOST_THREADS, torch.get_num_threads()) if width_px * height_px >= WORTH_THREADS_PX else 1


def each(deed: Callable[[Thing], Made], things: Iterable[Thing], threads: int) -> list[Made]:
    """The deed for each thing, in their order. The threads end with the call: a process that forks has none of them."""
    if threads == 1:
        return [deed(thing) for thing in things]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(deed, things))


def resized(image: Image.Image, width_px: int, height_px: int, threads: int) -> Image.Image:
    """image.resize((width_px, height_px), BICUBIC); the picture itself where it has that size."""
    if image.size == (width_px, height_px):
        return image
    if threads == 1:
        return image.resize((width_px, height_px), Image.Resampling.BICUBIC)
    if image.width != width_px:
        image = _by_bands(
            image, width_px, image.height, [(0, a, image.width, b) for a, b in bands(image.height, threads)], threads
        )
    if image.height != height_px:
        image = _by_bands(image, width_px, height_px, [(a, 0, b, image.height) for a, b in bands(width_px, threads)], threads)
    return image


def _by_bands(
    image: Image.Image, width_px: int, height_px: int, boxes: Sequence[tuple[int, int, int, int]], threads: int
) -> Image.Image:
    """The picture stretched in one direction. boxes: (left, top, right, bottom) of bands that go through in that direction."""

    def stretched(box: tuple[int, int, int, int]) -> Image.Image:
        left, top, right, bottom = box
        size = (width_px, bottom - top) if width_px != image.width else (right - left, height_px)
        return image.crop(box).resize(size, Image.Resampling.BICUBIC)

    whole = Image.new(image.mode, (width_px, height_px))
    for (left, top, _, _), part in zip(boxes, each(stretched, boxes, threads), strict=True):
        whole.paste(part, (left, top))
    return whole


def bands(length: int, count: int) -> list[tuple[int, int]]:
    """Beginnings and ends of at most count stretches of about one length."""
    step = -(-length // count)
    return [(start, min(start + step, length)) for start in range(0, length, step)]
