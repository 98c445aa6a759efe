"""Places that an answer marks, found in its text and drawn on the picture.

In: an answer with <ref>label</ref><box>[[x1, y1, x2, y2], …]</box>.  Out: boxes, the text as a person reads it, a drawing.
Coordinates are thousandths of the picture's width and height, as InternVL2 was taught them (0 to 1000).
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tessella.ui.pictures import Picture

_MARK = re.compile(r"(?:<ref>(?P<label>[^<]*)</ref>)?\s*<box>\s*(?P<boxes>\[.*?\])\s*</box>", re.DOTALL)
_FOUR = re.compile(r"\[\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*\]")
DRAWN_PX = 640  # longest side of a drawing, at least
# Eight colours that are told apart by people who see colours less well, after Okabe and Ito.
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#000000")


@dataclass(frozen=True)
class Box:
    """A rectangle in thousandths of the picture, x1 < x2 and y1 < y2."""

    label: str
    x1: int
    y1: int
    x2: int
    y2: int


def boxes_in(text: str) -> list[Box]:
    """Every box of an answer that lies in the picture and has an area; others are no boxes."""
    found = []
    for mark in _MARK.finditer(text):
        for four in _FOUR.finditer(mark["boxes"]):
            x1, y1, x2, y2 = (int(number) for number in four.groups())
            if x1 < x2 <= 1000 and y1 < y2 <= 1000:
                found.append(Box((mark["label"] or "").strip(), x1, y1, x2, y2))
    return found


def without_tags(text: str) -> str:
    """The answer as a person reads it: each marked thing by its label and the numbers of its boxes, ① and on."""
    number = 0

    def readable(mark: re.Match[str]) -> str:
        nonlocal number
        first, number = number, number + len(boxes_in(mark[0]))
        numbers = "".join(_circled(index + 1) for index in range(first, number))
        return f"{(mark['label'] or '').strip()} {numbers}" if numbers else mark[0]

    return _MARK.sub(readable, text)


def _circled(number: int) -> str:
    return chr(0x2460 + number - 1) if number <= 20 else f"({number})"


def draw(picture: Picture, boxes: list[Box], folder: Path) -> Path:
    """The picture as it is shown, with a frame and a label for each box; kept in folder under a name made of both."""
    name = hashlib.sha256(repr((picture.shown.name, boxes)).encode()).hexdigest()[:24]
    path = folder / f"{name}.webp"
    if path.is_file():
        return path
    with Image.open(picture.shown) as image:
        drawn = image.convert("RGB")
    if (longest_px := max(drawn.size)) < DRAWN_PX:  # on a small picture lines and numbers would hide what they mark
        drawn = drawn.resize((drawn.width * DRAWN_PX // longest_px, drawn.height * DRAWN_PX // longest_px))
    pen = ImageDraw.Draw(drawn)
    thick_px = max(2, round(max(drawn.size) / 200))
    font = ImageFont.load_default(size=max(11, round(max(drawn.size) / 40)))
    for number, box in enumerate(boxes):
        colour = COLOURS[number % len(COLOURS)]
        left, top = box.x1 * drawn.width // 1000, box.y1 * drawn.height // 1000
        right, bottom = box.x2 * drawn.width // 1000, box.y2 * drawn.height // 1000
        # A white frame around the coloured one: it is seen on a picture of the same colour, too.
        pen.rectangle((left - 2, top - 2, right + 2, bottom + 2), outline="white", width=thick_px + 4)
        pen.rectangle((left, top, right, bottom), outline=colour, width=thick_px)
        _label(pen, str(number + 1), left, top, colour, font)
    drawn.save(path, quality=90)
    return path


def _label(
    pen: ImageDraw.ImageDraw, text: str, left: int, top: int, colour: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> None:
    """A number on a patch of the box's colour. A number, since Pillow's own font has no Chinese; the page lists the labels."""
    x1, y1, x2, y2 = pen.textbbox((left, top), text, font=font)
    pen.rectangle((x1, y1, x2 + 6, y2 + 4), fill=colour)
    bright = sum(int(colour[at : at + 2], 16) * share for at, share in ((1, 0.3), (3, 0.59), (5, 0.11)))
    pen.text((left + 3, top + 1), text, fill="black" if bright > 110 else "white", font=font)
