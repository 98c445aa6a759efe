"""Places in a picture: marked in an answer's text, run-length coded, and drawn.

In: an answer with <ref>label</ref><box>[[x1, y1, x2, y2], …]</box>, or masks.  Out: boxes, COCO's run lengths, a drawing.
Coordinates are thousandths of the picture's width and height, as InternVL2 was taught them (0 to 1000).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARK = re.compile(r"(?:<ref>(?P<label>[^<]*)</ref>)?\s*<box>\s*(?P<boxes>\[.*?\])\s*</box>", re.DOTALL)
_FOUR = re.compile(r"\[\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*\]")
DRAWN_PX = 640  # longest side of a drawing, at least
# Eight colours that are told apart by people who see colours less well, after Okabe and Ito.
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#000000")
Mask = np.ndarray[Any, np.dtype[np.bool_]]  # (height, width)


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
    for mark in MARK.finditer(text):
        for four in _FOUR.finditer(mark["boxes"]):
            x1, y1, x2, y2 = (int(number) for number in four.groups())
            if x1 < x2 <= 1000 and y1 < y2 <= 1000:
                found.append(Box((mark["label"] or "").strip(), x1, y1, x2, y2))
    return found


def run_lengths(mask: Mask) -> dict[str, Any]:
    """COCO's uncompressed run-length code: down each column, lengths of runs that begin with zeros."""
    flat = mask.astype(np.uint8).flatten(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate(([0], ends, [len(flat)]))).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if len(flat) and flat[0] else runs}


def from_run_lengths(code: dict[str, Any]) -> Mask:
    """run_lengths undone. Raises ValueError when the runs do not add up to the size."""
    height, width = code["size"]
    counts = code["counts"]
    if sum(counts) != height * width:
        raise ValueError(f"run lengths add up to {sum(counts):,}, but {height} x {width} are {height * width:,}")
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return flat.reshape((height, width), order="F")


def draw_boxes(image: Image.Image, boxes: Sequence[Box], masks: Sequence[Mask] = ()) -> Image.Image:
    """A copy with a frame and a number for each box, and each mask in the colour of its box."""
    drawn = image.convert("RGB")
    if (longest_px := max(drawn.size)) < DRAWN_PX:  # on a small picture lines and numbers would hide what they mark
        drawn = drawn.resize((drawn.width * DRAWN_PX // longest_px, drawn.height * DRAWN_PX // longest_px))
    for number, mask in enumerate(masks):
        shape = Image.fromarray(mask.astype(np.uint8) * 120).resize(drawn.size)
        drawn.paste(Image.new("RGB", drawn.size, COLOURS[number % len(COLOURS)]), mask=shape)
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
    return drawn


def _label(
    pen: ImageDraw.ImageDraw, text: str, left: int, top: int, colour: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> None:
    """A number on a patch of the box's colour. A number, since Pillow's own font has no Chinese; the labels are listed beside."""
    x1, y1, x2, y2 = pen.textbbox((left, top), text, font=font)
    pen.rectangle((x1, y1, x2 + 6, y2 + 4), fill=colour)
    bright = sum(int(colour[at : at + 2], 16) * share for at, share in ((1, 0.3), (3, 0.59), (5, 0.11)))
    pen.text((left + 3, top + 1), text, fill="black" if bright > 110 else "white", font=font)
