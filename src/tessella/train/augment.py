"""Pictures are changed a little at each look, so that a few photos teach more than themselves.

In: an RGB picture, and who looks (seed, epoch, sample).  Out: an RGB picture; for the same look the same, so that resume repeats.
"""

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageEnhance

from tessella.chat import Message

MIRROR = Image.Transpose.FLIP_LEFT_RIGHT
SIDES = re.compile(r"<box>|左|右|\b(?:left|right|clockwise|anticlockwise|counterclockwise|mirrored)", re.IGNORECASE)


@dataclass(frozen=True)
class Augmentation:
    """How far a picture may be changed; each deed is drawn evenly from its range."""

    least_area: float = 0.5  # share of the picture that a crop keeps, drawn from [least_area, 1]
    aspect: float = 1.25  # the crop's aspect ratio is the picture's times at most this, or its inverse
    mirror: bool = False  # left and right swapped in half of the looks; not where writing or left/right is asked
    turn_deg: float = 8.0
    brightness: float = 0.25  # each factor is drawn from [1 - x, 1 + x]
    contrast: float = 0.25
    saturation: float = 0.3
    hue: float = 0.015  # share of the colour circle; at 0.05 a yellow apple became the green kind
    jpeg_quality: tuple[int, int] | None = None  # compressed and opened again, with a quality of this range
    recolours: bool = True  # false: neither turned, cropped nor recoloured


AUGMENTATIONS = {
    "none": None,
    # InternVL's data_augment: build_transform of OpenGVLab/InternVL at 2410d1d compresses with a quality of 75 to 100.
    "jpeg": Augmentation(jpeg_quality=(75, 100), recolours=False),
    "light": Augmentation(least_area=0.5),
    "photo": Augmentation(least_area=0.5, mirror=True, turn_deg=12.0, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.02),
}


def augment(
    picture: Image.Image, name: str, *, seed: int, epoch: int, sample: str, mirror: bool = True, jpeg: bool = False
) -> Image.Image:
    """Change an RGB picture as AUGMENTATIONS[name] says; the same (seed, epoch, sample) gives the same pixels.

    mirror: false where a mirrored picture would contradict the text, whatever the name says. jpeg: compress it too.
    The size stays, so that grid, slots and length of the sample stay what they were measured to be.
    """
    settings = AUGMENTATIONS[name]
    if settings is None:
        if not jpeg:
            return picture
        settings = AUGMENTATIONS["jpeg"]
        assert settings is not None
    elif jpeg or not mirror:
        settings = replace(settings, mirror=settings.mirror and mirror, jpeg_quality=(75, 100) if jpeg else settings.jpeg_quality)
    digest = hashlib.sha256(f"{seed}/{epoch}/{sample}".encode()).digest()
    chance = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
    return apply(picture, settings, chance)


def apply(picture: Image.Image, settings: Augmentation, chance: np.random.Generator) -> Image.Image:
    """One look: turned, cropped, mirrored or not, recoloured, compressed."""
    if settings.recolours:
        picture = _crop(_turn(picture, settings, chance), settings, chance)
        if settings.mirror and chance.random() < 0.5:
            picture = picture.transpose(MIRROR)
        picture = _colour(picture, settings, chance)
    return picture if settings.jpeg_quality is None else _compress(picture, settings.jpeg_quality, chance)


def _compress(picture: Image.Image, quality: tuple[int, int], chance: np.random.Generator) -> Image.Image:
    """Through JPEG and back."""
    low, high = quality
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=int(chance.integers(low, high + 1)))
    return Image.open(stream).convert("RGB")


def may_mirror(messages: Sequence[Message]) -> bool:
    """False where a text speaks of left and right, or holds a box: a mirrored picture would contradict it."""
    return not any(SIDES.search(message.text) for message in messages if message.role != "system")


def _turn(picture: Image.Image, settings: Augmentation, chance: np.random.Generator) -> Image.Image:
    degrees = chance.uniform(-settings.turn_deg, settings.turn_deg)
    mean = tuple(round(x) for x in np.asarray(picture.resize((1, 1), Image.Resampling.BOX)).reshape(-1).tolist())
    # The corners take the mean colour: black ones would be a sign to learn from.
    return picture.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=mean)


def _crop(picture: Image.Image, settings: Augmentation, chance: np.random.Generator) -> Image.Image:
    area = chance.uniform(settings.least_area, 1.0)
    stretch = float(np.exp(chance.uniform(-1, 1) * np.log(settings.aspect)))
    width = min(1.0, (area * stretch) ** 0.5) * picture.width
    height = min(1.0, (area / stretch) ** 0.5) * picture.height
    left = chance.uniform(0, picture.width - width)
    top = chance.uniform(0, picture.height - height)
    return picture.resize(picture.size, Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))


def _colour(picture: Image.Image, settings: Augmentation, chance: np.random.Generator) -> Image.Image:
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    reaches = (settings.brightness, settings.contrast, settings.saturation)
    factors = [1 + chance.uniform(-reach, reach) for reach in reaches]
    for index in chance.permutation(3):
        picture = enhancers[index](picture).enhance(factors[index])
    shift = round(256 * chance.uniform(-settings.hue, settings.hue)) % 256
    if not shift:
        return picture
    hue, saturation, value = picture.convert("HSV").split()
    turned = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")
