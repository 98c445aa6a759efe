"""Scenes of foods, composed on the fly: cut-outs on drawn or photographed grounds, with true boxes and masks.

In: a seed and a number.  Out: a Scene, the same for the same seed and number, whoever asks and when.
The shipped drawings stand on white; what white reaches from a corner is not the food. Later foods cover earlier ones: masks
and boxes are of what can still be seen, and no food loses more than half of itself.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from tessella.errors import DataError, ImageError
from tessella.foods import Food, foods, picture
from tessella.image import open_image
from tessella.scenes.truth import Box, Mask, box_of

SIDE_PX = 224
SEEN = 0.5  # share of a food that must stay visible
WHITE = 24  # a pixel whose three colours miss white by no more than this together
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Kit:
    """What scenes are made of."""

    styles: tuple[str, ...]
    photos: tuple[Path, ...] = ()  # grounds beside the drawn ones
    most_objects: int = 5
    seed: int = 0
    foods: int | None = None  # only the first so many
    held_out: bool = False  # other numbers than any scene that teaches

    def chance(self, number: int, what: str) -> random.Random:
        """The chance of one scene; what keeps the scene and what is asked of it apart."""
        part = "held out" if self.held_out else "taught"
        return random.Random(hashlib.sha256(f"{self.seed}/{part}/{number}/{what}".encode()).digest())

    def pick(self) -> Sequence[Food]:
        return foods()[: self.foods]


@dataclass(frozen=True, eq=False)
class Thing:
    """One food in a scene, as far as it can be seen."""

    food: Food
    style: str
    mask: Mask
    box: Box


@dataclass(frozen=True, eq=False)
class Scene:
    picture: Image.Image
    things: tuple[Thing, ...]


def photos_in(folder: Path) -> tuple[Path, ...]:
    """The pictures below a folder, in a fixed order. Raises DataError when there is none."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; give a folder of photographs as grounds for scenes")
    found = tuple(sorted(path for path in folder.rglob("*") if path.suffix.lower() in PHOTO_SUFFIXES))
    if not found:
        raise DataError(f"{folder} holds no photographs ({', '.join(PHOTO_SUFFIXES)}); give another folder, or leave it out")
    return found


def compose(kit: Kit, number: int) -> Scene:
    """Scene number `number`. Raises ImageError when a photograph cannot be opened."""
    chance = kit.chance(number, "scene")
    ground = photo_ground(kit.photos, chance) if kit.photos and chance.random() < 0.5 else drawn_ground(chance)
    count = chance.randint(1, kit.most_objects)
    placed: list[tuple[Food, str, Mask, int]] = []  # and its whole area
    canvas = ground
    for _ in range(count):
        food, style = chance.choice(kit.pick()), chance.choice(kit.styles)
        if placed and chance.random() < 0.25:
            food = chance.choice(placed)[0]  # two of a kind are no rarity
        for _ in range(8):  # a place where enough of everything stays visible
            cut, mask = _pose(food, style, chance)
            left = [seen & ~mask for _, _, seen, _ in placed]
            if all(one.sum() >= SEEN * area for one, (*_, area) in zip(left, placed, strict=True)):
                placed = [(f, s, seen, area) for (f, s, _, area), seen in zip(placed, left, strict=True)]
                placed.append((food, style, mask, int(mask.sum())))
                canvas = Image.composite(cut, canvas, Image.fromarray(mask.astype(np.uint8) * 255).filter(SOFT))
                break
    things = tuple(Thing(food, style, mask, box_of(mask)) for food, style, mask, _ in placed)
    return Scene(canvas, things)


SOFT = ImageFilter.GaussianBlur(0.6)  # edges blend with the ground


def _pose(food: Food, style: str, chance: random.Random) -> tuple[Image.Image, Mask]:
    """A food somewhere on an empty picture of the scene's size: its pixels, and where they count."""
    drawing, shape = cut_out(food, style)
    side = round(SIDE_PX * chance.uniform(0.18, 0.55))
    if chance.random() < 0.5:
        drawing, shape = ImageOps.mirror(drawing), ImageOps.mirror(shape)
    angle = chance.uniform(-20, 20)
    drawing, shape = (
        one.rotate(angle, Image.Resampling.BICUBIC, fillcolor=fill).resize((side, side), Image.Resampling.BICUBIC)
        for one, fill in ((drawing, (255, 255, 255)), (shape, 0))
    )
    drawing = ImageEnhance.Brightness(drawing).enhance(chance.uniform(0.75, 1.15))
    x, y = (chance.randint(0, SIDE_PX - side) for _ in range(2))
    canvas = Image.new("RGB", (SIDE_PX, SIDE_PX))
    canvas.paste(drawing, (x, y))
    mask = np.zeros((SIDE_PX, SIDE_PX), dtype=np.bool_)
    mask[y : y + side, x : x + side] = np.asarray(shape) > 127
    return canvas, mask


@cache
def cut_out(food: Food, style: str) -> tuple[Image.Image, Image.Image]:
    """The drawing cropped to a square around the food, and its shape (L, 255 where the food is)."""
    drawing = Image.open(picture(food, style)).convert("RGB")
    shape = Image.fromarray((~white_around(np.asarray(drawing))).astype(np.uint8) * 255)
    shape = shape.filter(ImageFilter.MedianFilter(3))  # no crumbs of compression
    left, top, right, bottom = shape.getbbox() or (0, 0, *drawing.size)
    side, (x, y) = max(right - left, bottom - top), ((left + right) // 2, (top + bottom) // 2)
    frame = (x - side // 2, y - side // 2, x - side // 2 + side, y - side // 2 + side)
    ground = Image.new("RGB", drawing.size, (255, 255, 255))
    return Image.composite(drawing, ground, shape).crop(frame), shape.crop(frame)


def white_around(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Mask:
    """pixels (height, width, 3) -> what near-white neighbours join to the border. PIL's flood fill takes 0.3 s for this."""
    white = np.pad((255 - pixels.astype(np.int64)).sum(-1) <= WHITE, 1, constant_values=True)
    reached = np.zeros_like(white)
    reached[0] = reached[-1] = reached[:, 0] = reached[:, -1] = True
    count = 0
    while count < (count := int(reached.sum())):
        for _ in range(8):  # steps between two looks at whether it still grows
            grown = reached.copy()
            grown[1:] |= reached[:-1]
            grown[:-1] |= reached[1:]
            grown[:, 1:] |= reached[:, :-1]
            grown[:, :-1] |= reached[:, 1:]
            reached = grown & white
    return reached[1:-1, 1:-1]


def photo_ground(photos: Sequence[Path], chance: random.Random) -> Image.Image:
    """A square of a photograph."""
    path = chance.choice(photos)
    try:
        photo = open_image(path)
    except ImageError as error:
        raise ImageError(f"{error}; it is one of the photographs given as grounds: take it out of the folder") from error
    side = min(photo.size)
    part = max(32, round(side * chance.uniform(0.5, 1.0)))
    x, y = (chance.randint(0, max(0, whole - part)) for whole in photo.size)
    return photo.crop((x, y, x + part, y + part)).resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)


def drawn_ground(chance: random.Random) -> Image.Image:
    """Plain, shaded, striped, checked or spotted, in two colours."""
    one, other = (tuple(chance.randint(0, 255) for _ in range(3)) for _ in range(2))
    kind = chance.choice(("plain", "shaded", "striped", "checked", "spotted"))
    ground = Image.new("RGB", (SIDE_PX, SIDE_PX), one)
    draw = ImageDraw.Draw(ground)
    step = chance.randint(8, 40)
    if kind == "shaded":
        ramp = Image.linear_gradient("L").resize((SIDE_PX, SIDE_PX)).rotate(90 * chance.randint(0, 3))
        ground = Image.composite(ground, Image.new("RGB", ground.size, other), ramp)
    elif kind == "striped":
        for x in range(0, 2 * SIDE_PX, 2 * step):
            draw.line((x, 0, x - SIDE_PX // 2, SIDE_PX), fill=other, width=step)
    elif kind == "checked":
        for row in range(0, SIDE_PX, step):
            for column in range(row % (2 * step), SIDE_PX, 2 * step):
                draw.rectangle((column, row, column + step - 1, row + step - 1), fill=other)
    elif kind == "spotted":
        for _ in range(chance.randint(5, 40)):
            x, y, r = chance.randint(0, SIDE_PX), chance.randint(0, SIDE_PX), chance.randint(2, step)
            draw.ellipse((x - r, y - r, x + r, y + r), fill=other)
    return ground
