"""Draws training pictures: pages, cut-outs laid on them, shapes in named colours, rendered words.

In: a Parts (emoji, fonts, words, photographs) and a random.Random, from which all chance is taken.
Out: RGB pictures of 224 px.  A cut-out is an RGBA picture whose empty rim is cropped.
"""

import io
import json
import math
import random
import re
import tarfile
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

SIDE_PX = 224
CAP_SHARE = 0.7  # height of a capital letter as a share of the font's size
SUPER = 3  # shapes are drawn so many times larger and reduced: smooth edges
Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (218, 32, 38), "orange": (244, 136, 22), "yellow": (248, 220, 40), "green": (38, 152, 58), "blue": (34, 84, 214),
    "purple": (126, 44, 172), "pink": (250, 140, 190), "brown": (118, 68, 30), "black": (18, 18, 18), "white": (246, 246, 246),
    "grey": (132, 132, 132),
}  # fmt: skip
UNTINTED = {"black", "white", "grey"}  # jitter moves their lightness only
SHAPES = ("circle", "square", "triangle", "star", "ring", "diamond", "rectangle", "hexagon", "heart", "cross", "crescent")


class Photo(NamedTuple):
    """Where a photograph lies in a tar, and what it shows."""

    tar: Path
    offset: int
    size: int
    label: str  # "n01443537" for Tiny-ImageNet, else the name itself

    def read(self) -> bytes:
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def open(self) -> Image.Image:
        return Image.open(io.BytesIO(self.read())).convert("RGB")


@cache
def photos_of(*tars: Path) -> list[Photo]:
    """Every picture of the tars; label = its folder, or the name after the WordNet id when there is no folder."""
    rows = []
    for tar in tars:
        with tarfile.open(tar) as file:
            members = [m for m in file if m.isfile() and m.name.endswith(".webp")]
        for m in members:
            path = Path(m.name)
            named = re.fullmatch(r"n\d{8}_(.+)", path.stem)
            label = path.parent.name or (named[1].replace("_", " ") if named else "")
            if label:  # a picture of all the folder's kinds has no label
                rows.append(Photo(tar, m.offset_data, m.size, label))
    return rows


@dataclass(frozen=True)
class Parts:
    """All that pictures are drawn from: where it lies. What is read is kept by the functions below, once a process."""

    folder: Path
    data: Path
    styles: tuple[str, ...]
    sizes_px: tuple[int, int] = (17, 60)  # height of a capital letter in a rendered word

    @property
    def names(self) -> dict[str, dict]:
        return read_json(self.folder / "names.json")

    @property
    def words(self) -> dict[str, list[str]]:
        return read_json(self.folder / "words.json")

    @property
    def unseen_words(self) -> frozenset[str]:
        return frozenset_of(self.folder / "words.json", "held_out")

    @property
    def fonts(self) -> tuple[str, ...]:
        return fonts_in(self.folder / "fonts")

    @property
    def held_out_fonts(self) -> tuple[str, ...]:
        return fonts_in(self.folder / "fonts" / "held_out")

    @property
    def tiny(self) -> list[Photo]:
        return photos_of(self.data / "tiny-imagenet-train-0.tar", self.data / "tiny-imagenet-train-1.tar")

    @property
    def one_each(self) -> list[Photo]:
        return photos_of(self.data / "imagenet-one-each.tar")

    @property
    def dishes(self) -> list[Photo]:
        return photos_of(self.data / "food101-ten.tar")

    @property
    def wordnet(self) -> dict[str, str]:
        return read_json(self.data / "tiny-imagenet-classes.json")

    def emoji(self, style: str, code: str) -> Image.Image:
        return cut_out(self.folder / "emoji" / style / f"{code}.webp")


@cache
def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@cache
def frozenset_of(path: Path, key: str) -> frozenset[str]:
    return frozenset(read_json(path)[key])


@cache
def fonts_in(folder: Path) -> tuple[str, ...]:
    return tuple(str(p) for p in sorted(folder.glob("*.?tf")))


@cache
def cut_out(path: Path) -> Image.Image:
    """An emoji without its empty rim."""
    image = Image.open(path).convert("RGBA")
    return image.crop(image.getchannel("A").point(lambda a: 255 if a > 16 else 0).getbbox())


@lru_cache(maxsize=4096)
def font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def luminance(colour: Colour) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def distance(a: Colour, b: Colour) -> float:
    return math.dist(a, b)


def any_colour(rng: random.Random) -> Colour:
    return (rng.randrange(256), rng.randrange(256), rng.randrange(256))


def named_colour(rng: random.Random, name: str) -> Colour:
    """A colour that everyone calls by that name."""
    base = COLOURS[name]
    if name in UNTINTED:
        shift = rng.randint(-16, 16)
        return (_byte(base[0] + shift), _byte(base[1] + shift), _byte(base[2] + shift))
    return (_byte(base[0] + rng.randint(-16, 16)), _byte(base[1] + rng.randint(-16, 16)), _byte(base[2] + rng.randint(-16, 16)))


def _byte(value: int) -> int:
    return max(0, min(255, value))


def scaled(image: Image.Image, longer_px: int) -> Image.Image:
    scale = longer_px / max(image.size)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BILINEAR)


# ---------------------------------------------------------------- pages


def plain_page(colour: Colour) -> Image.Image:
    return Image.new("RGB", (SIDE_PX, SIDE_PX), colour)


def gradient_page(rng: random.Random, a: Colour, b: Colour) -> Image.Image:
    """From colour a to colour b, along a random side or corner."""
    corners = [a, b, a, b] if rng.random() < 0.5 else [a, a, b, b]
    if rng.random() < 0.3:
        corners = [
            a,
            tuple((x + y) // 2 for x, y in zip(a, b, strict=True)),
            tuple((x + y) // 2 for x, y in zip(a, b, strict=True)),
            b,
        ]
    small = Image.new("RGB", (2, 2))
    small.putdata(corners)
    return small.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)


def photo_page(rng: random.Random, parts: Parts) -> Image.Image:
    """A training photograph as background, at times out of focus."""
    image = rng.choice(parts.tiny).open().resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR)
    return image.filter(ImageFilter.BoxBlur(rng.randint(2, 6))) if rng.random() < 0.4 else image


def page_away_from(rng: random.Random, colours: list[Colour], far: float) -> Image.Image:
    """White, plain or gradient, at least `far` (RGB distance) from every colour that will lie on it."""
    white: Colour = (255, 255, 255)
    if rng.random() < 0.4 and all(distance(white, c) > far for c in colours):
        return plain_page(white)
    best, best_far = white, -1.0
    for _ in range(24):
        colour = any_colour(rng)
        nearest = min(distance(colour, c) for c in colours)
        if nearest > best_far:
            best, best_far = colour, nearest
        if nearest > far + 20:
            break
    if rng.random() < 0.3:
        near = (
            _byte(best[0] + rng.randint(-20, 20)),
            _byte(best[1] + rng.randint(-20, 20)),
            _byte(best[2] + rng.randint(-20, 20)),
        )
        return gradient_page(rng, best, near)
    return plain_page(best)


def object_page(rng: random.Random, parts: Parts, photo_share: float) -> Image.Image:
    """A page for emoji: mostly white or pale, so that dark and light drawings both show."""
    draw = rng.random()
    if draw < photo_share:
        return photo_page(rng, parts)
    if draw < photo_share + 0.4:
        return plain_page((255, 255, 255))
    low = 150 if rng.random() < 0.7 else 20
    a, b = ((rng.randint(low, 255), rng.randint(low, 255), rng.randint(low, 255)) for _ in range(2))
    return plain_page(a) if rng.random() < 0.7 else gradient_page(rng, a, b)


# ---------------------------------------------------------------- cut-outs


def shape(kind: str, colour: Colour, px: int) -> Image.Image:
    """One filled shape, RGBA, px square at most."""
    s = px * SUPER
    mask = Image.new("L", (s, s), 0)
    pen = ImageDraw.Draw(mask)
    if kind in ("circle", "ring", "crescent"):
        pen.ellipse((0, 0, s - 1, s - 1), fill=255)
        if kind == "ring":
            pen.ellipse((s * 0.24, s * 0.24, s * 0.76, s * 0.76), fill=0)
        if kind == "crescent":
            pen.ellipse((s * 0.32, -s * 0.04, s * 1.3, s * 0.94), fill=0)
    elif kind == "square":
        pen.rectangle((s * 0.06, s * 0.06, s * 0.94, s * 0.94), fill=255)
    elif kind == "rectangle":
        pen.rectangle((0, s * 0.26, s - 1, s * 0.74), fill=255)
    elif kind == "cross":
        pen.rectangle((s * 0.34, 0, s * 0.66, s - 1), fill=255)
        pen.rectangle((0, s * 0.34, s - 1, s * 0.66), fill=255)
    elif kind == "heart":
        pen.ellipse((0, s * 0.05, s * 0.52, s * 0.57), fill=255)
        pen.ellipse((s * 0.48, s * 0.05, s - 1, s * 0.57), fill=255)
        pen.polygon([(s * 0.04, s * 0.43), (s * 0.96, s * 0.43), (s * 0.5, s * 0.98)], fill=255)
    else:
        pen.polygon([(x * s, y * s) for x, y in _CORNERS[kind]], fill=255)
    mask = mask.reduce(SUPER)
    image = Image.new("RGBA", mask.size, (*colour, 255))
    image.putalpha(mask)
    return image.crop(mask.getbbox())


def _regular(corners: int, turn: float, inner: float = 1.0) -> list[tuple[float, float]]:
    steps = [(turn + 2 * math.pi * i / corners, 0.5 if inner == 1.0 or i % 2 == 0 else 0.5 * inner) for i in range(corners)]
    return [(0.5 + r * math.sin(a), 0.5 - r * math.cos(a)) for a, r in steps]


_CORNERS = {
    "triangle": [(0.5, 0.05), (0.98, 0.92), (0.02, 0.92)],
    "diamond": [(0.5, 0.0), (0.86, 0.5), (0.5, 1.0), (0.14, 0.5)],
    "hexagon": _regular(6, 0.0),
    "star": _regular(10, 0.0, 0.42),
}


def lay(page: Image.Image, cut: Image.Image, x: int, y: int) -> None:
    """Paste a cut-out with its upper left corner at (x, y)."""
    page.paste(cut, (x, y), cut)


class Box(NamedTuple):
    x: int
    y: int
    width: int
    height: int

    def clear_of(self, other: "Box", gap: int) -> bool:
        return (
            self.x + self.width + gap <= other.x or other.x + other.width + gap <= self.x
            or self.y + self.height + gap <= other.y or other.y + other.height + gap <= self.y
        )  # fmt: skip


def scatter(rng: random.Random, cuts: list[Image.Image], gap: int = 4) -> list[Box] | None:
    """Places without overlap for all cut-outs, or None when forty tries found none."""
    for _ in range(40):
        boxes: list[Box] = []
        for cut in cuts:
            for _ in range(12):
                box = Box(
                    rng.randint(2, SIDE_PX - cut.width - 2), rng.randint(2, SIDE_PX - cut.height - 2), cut.width, cut.height
                )
                if all(box.clear_of(b, gap) for b in boxes):
                    boxes.append(box)
                    break
            else:
                break
        if len(boxes) == len(cuts):
            return boxes
    return None


# ---------------------------------------------------------------- words


def word_picture(rng: random.Random, parts: Parts, word: str, font_path: str) -> Image.Image:
    """One word on a plain, shaded or photographic page: size, place, colour and a slight turn by chance."""
    mask = _word_mask(rng, word, font_path, rng.uniform(*parts.sizes_px))
    kind = rng.random()
    if kind < 0.2:
        page, ink, plate = _on_photo(rng, parts)
    else:
        ink, ground = _contrasting(rng)
        page, plate = plain_page(ground), None
        if kind > 0.75:
            page = gradient_page(rng, ground, _shifted(rng, ground, ink))
    mask = mask.crop((0, 0, min(mask.width, SIDE_PX), min(mask.height, SIDE_PX)))  # a hanging stroke may reach out
    x, y = rng.randint(0, SIDE_PX - mask.width), rng.randint(0, SIDE_PX - mask.height)
    if plate is not None:
        ImageDraw.Draw(page).rectangle((x - 4, y - 4, x + mask.width + 4, y + mask.height + 4), fill=plate)
    page.paste(ink, (x, y), mask)
    return page.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.7))) if rng.random() < 0.1 else page


def _word_mask(rng: random.Random, word: str, font_path: str, cap_px: float) -> Image.Image:
    size = max(10, round(cap_px / CAP_SHARE))
    room = SIDE_PX - 12
    width = font(font_path, size).getlength(word)
    if width > room:
        size = max(10, int(size * room / width))
    face = font(font_path, size)
    left, top, right, bottom = face.getbbox(word)
    mask = Image.new("L", (math.ceil(right - left) + 4, math.ceil(bottom - top) + 4), 0)
    ImageDraw.Draw(mask).text((2 - left, 2 - top), word, font=face, fill=255)
    if rng.random() < 0.5:
        turned = mask.rotate(rng.uniform(-8, 8), Image.Resampling.BILINEAR, expand=True)
        if turned.width <= SIDE_PX and turned.height <= SIDE_PX:
            mask = turned
    return mask


def _contrasting(rng: random.Random) -> tuple[Colour, Colour]:
    """(ink, ground): black on white often, else any two colours whose lightness differs by 90 of 255 or more."""
    if rng.random() < 0.3:
        return (0, 0, 0), (255, 255, 255)
    while True:
        ink, ground = any_colour(rng), any_colour(rng)
        if abs(luminance(ink) - luminance(ground)) >= 90:
            return ink, ground


def _shifted(rng: random.Random, ground: Colour, ink: Colour) -> Colour:
    """Another ground, away from the ink."""
    away = 1 if luminance(ground) > luminance(ink) else -1
    return tuple(_byte(c + away * rng.randint(0, 60)) for c in ground)  # type: ignore[return-value]


def _on_photo(rng: random.Random, parts: Parts) -> tuple[Image.Image, Colour, Colour | None]:
    """(page, ink, plate): a photograph darkened or paled, or with a plate under the word."""
    page = photo_page(rng, parts)
    if rng.random() < 0.4:
        ink, ground = _contrasting(rng)
        return page, ink, ground
    if rng.random() < 0.5:
        return page.point(lambda v: v * 2 // 5), (255, rng.randint(200, 255), rng.randint(120, 255)), None
    dark = (rng.randint(0, 60), rng.randint(0, 60), rng.randint(0, 80))
    return ImageChops.add(page.point(lambda v: v * 2 // 5), plain_page((150, 150, 150))), dark, None
