"""Pictures are changed a little at each look, so that a few photos teach more than themselves.

In: an RGB picture, and who looks (seed, epoch, sample).  Out: an RGB picture; for the same look the same, so that resume repeats.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance

MIRROR = Image.Transpose.FLIP_LEFT_RIGHT


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


AUGMENTATIONS = {
    "none": None,
    "light": Augmentation(least_area=0.5),
    "photo": Augmentation(least_area=0.5, mirror=True, turn_deg=12.0, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.02),
}


def augment(picture: Image.Image, name: str, *, seed: int, epoch: int, sample: str) -> Image.Image:
    """Change an RGB picture as AUGMENTATIONS[name] says; the same (seed, epoch, sample) gives the same pixels.

    The size stays, so that grid, slots and length of the sample stay what they were measured to be.
    """
    settings = AUGMENTATIONS[name]
    if settings is None:
        return picture
    digest = hashlib.sha256(f"{seed}/{epoch}/{sample}".encode()).digest()
    chance = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
    return apply(picture, settings, chance)


def apply(picture: Image.Image, settings: Augmentation, chance: np.random.Generator) -> Image.Image:
    """One look: turned, cropped, mirrored or not, recoloured."""
    picture = _crop(_turn(picture, settings, chance), settings, chance)
    if settings.mirror and chance.random() < 0.5:
        picture = picture.transpose(MIRROR)
    return _colour(picture, settings, chance)


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
