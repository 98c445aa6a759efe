"""A resize in bands is Pillow's own to the bit, whatever the sizes; and no thread is left."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tessella.bands import bands, each, resized, threads_for
from tessella.image import TileRule, cut_tiles

side = st.integers(1, 90)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8))


@given(side, side, side, side, st.integers(1, 8))
@settings(max_examples=80, deadline=None)
def test_bands_are_pillows_bicubic_bit_for_bit(width: int, height: int, new_width: int, new_height: int, threads: int) -> None:
    image = noise(width, height)
    plain = np.asarray(image.resize((new_width, new_height), Image.Resampling.BICUBIC))
    assert np.array_equal(np.asarray(resized(image, new_width, new_height, threads)), plain)


def test_large_pictures_are_cut_alike_with_and_without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    image, rule, before = noise(1000, 700), TileRule(224, max_tiles=12), threading.active_count()
    cuts = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert threads_for(*image.size) == threads and threads_for(448, 448) == 1
        cuts.append(cut_tiles(image, rule))
    assert torch.equal(cuts[0].pixels, cuts[1].pixels) and cuts[0].digests == cuts[1].digests
    assert len(set(cuts[0].digests)) == len(cuts[0].pixels) > 2
    assert threading.active_count() == before


@pytest.mark.parametrize(("length", "count"), [(1, 8), (7, 8), (8, 8), (9, 8), (100, 3)])
def test_bands_cover_all_once(length: int, count: int) -> None:
    covered = [place for start, end in bands(length, count) for place in range(start, end)]
    assert covered == list(range(length)) and len(bands(length, count)) <= count


def test_a_fault_in_a_thread_is_the_callers() -> None:
    with pytest.raises(ZeroDivisionError):
        each(lambda x: 1 // x, [1, 0], 2)
