"""Places that an answer marks, found in its text and drawn on the picture.

In: an answer with <ref>label</ref><box>[[x1, y1, x2, y2], …]</box>.  Out: boxes, the text as a person reads it, a drawing.
Coordinates are thousandths of the picture's width and height, as InternVL2 was taught them (0 to 1000).
"""

import hashlib
import re
from pathlib import Path

from PIL import Image

from tessella.marks import MARK, Box, boxes_in, draw_boxes
from tessella.ui.pictures import Picture


def without_tags(text: str) -> str:
    """The answer as a person reads it: each marked thing by its label and the numbers of its boxes, ① and on."""
    number = 0

    def readable(mark: re.Match[str]) -> str:
        nonlocal number
        first, number = number, number + len(boxes_in(mark[0]))
        numbers = "".join(_circled(index + 1) for index in range(first, number))
        return f"{(mark['label'] or '').strip()} {numbers}" if numbers else mark[0]

    return MARK.sub(readable, text)


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
    drawn = draw_boxes(drawn, boxes)
    drawn.save(path, quality=90)
    return path
