"""Augmentation: the same look twice is the same picture, and no look leaves what was asked for."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tessella.train.augment import AUGMENTATIONS, apply, augment
from tessella.train.recipe import Recipe


def scene(width: int = 96, height: int = 64) -> Image.Image:
    """Red on the left, blue on the right, brighter towards the bottom."""
    rows = np.linspace(60, 220, height, dtype=np.uint8)[:, None]
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, : width // 2, 0] = rows
    pixels[:, width // 2 :, 2] = rows
    return Image.fromarray(pixels)


@pytest.mark.parametrize("name", ["light", "photo"])
def test_a_look_repeats_exactly_and_another_differs(name: str) -> None:
    look = augment(scene(), name, seed=3, epoch=1, sample="a")
    assert look.tobytes() == augment(scene(), name, seed=3, epoch=1, sample="a").tobytes()
    others = [(4, 1, "a"), (3, 2, "a"), (3, 1, "b")]
    assert all(augment(scene(), name, seed=s, epoch=e, sample=k).tobytes() != look.tobytes() for s, e, k in others)


def test_none_changes_nothing() -> None:
    assert augment(scene(), "none", seed=0, epoch=0, sample="a").tobytes() == scene().tobytes()


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 200), st.integers(2, 200), st.sampled_from(["light", "photo"]), st.integers(0, 10_000))
def test_every_look_is_rgb_and_keeps_the_size_and_so_the_length_of_the_sample(
    width: int, height: int, name: str, epoch: int
) -> None:
    look = augment(scene(width, height), name, seed=0, epoch=epoch, sample="a")
    assert (look.mode, look.size) == ("RGB", (width, height))


@pytest.mark.parametrize("name", ["light", "photo"])
def test_a_crop_keeps_about_the_stated_share(name: str) -> None:
    # Along a ramp from 0 to 255 the spread of the values is the share of the width that was kept; colour is switched off.
    ramp = Image.fromarray(np.repeat(np.linspace(0, 255, 200)[None, :], 200, axis=0).astype(np.uint8)).convert("RGB")
    settings_ = AUGMENTATIONS[name]
    assert settings_ is not None
    plain = replace(settings_, mirror=False, turn_deg=0.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)
    least = (settings_.least_area / settings_.aspect) ** 0.5
    shares = []
    for seed in range(60):
        values = np.asarray(apply(ramp, plain, np.random.default_rng(seed)))[..., 0].astype(int)
        shares.append((values.max() - values.min()) / 255)
    assert least - 0.02 < min(shares) < least + 0.25
    assert max(shares) > 0.95


def test_only_photo_mirrors() -> None:
    def red_on_the_left(name: str, epoch: int) -> bool:
        pixels = np.asarray(augment(scene(), name, seed=0, epoch=epoch, sample="a")).astype(int)
        red = pixels[..., 0] - pixels[..., 2]
        return bool(red[:, : red.shape[1] // 4].mean() > red[:, -red.shape[1] // 4 :].mean())

    assert all(red_on_the_left("light", epoch) for epoch in range(40))
    assert 8 < sum(red_on_the_left("photo", epoch) for epoch in range(40)) < 32


def test_every_choice_of_a_recipe_is_an_augmentation() -> None:
    for name in AUGMENTATIONS:
        assert Recipe(augment=name).augment == name  # type: ignore[arg-type]
