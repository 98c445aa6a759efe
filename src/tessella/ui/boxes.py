"""Places that an answer marks, found in its text and drawn on the picture.

In: an answer with <ref>label</ref><box>[[x1, y1, x2, y2], …]</box>.  Out: boxes, the text as a person reads it, a drawing.
Coordinates are thousandths of the picture's width and height, as InternVL2 was taught them (0 to 1000).
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from tessella.marks import MARK, Box, Mask, boxes_in, draw_boxes, from_run_lengths
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


@dataclass(frozen=True, eq=False)
class Routed:
    """What the decoders of a routed model gave: boxes with their masks, pictures as data: addresses, and why there is none."""

    boxes: list[Box]
    masks: list[Mask]
    pictures: list[str]
    troubles: list[str]


def routed_in(rows: Sequence[Mapping[str, Any]]) -> Routed:
    """The server's field `routed` (docs/boxes.md). A row in another form shows nothing: it comes over the network."""
    found = Routed([], [], [], [])
    for row in rows:
        for one in row.get("objects") or ():
            try:
                box, mask = Box(str(row.get("label", "")), *(int(side) for side in one["box"])), from_run_lengths(one["mask"])
            except (KeyError, TypeError, ValueError):
                continue
            found.boxes.append(box)
            found.masks.append(mask)
        picture = row.get("picture")
        if isinstance(picture, str) and picture.startswith("data:image/"):
            found.pictures.append(picture)
        trouble = row.get("trouble")
        if isinstance(trouble, str) and trouble and trouble not in found.troubles:
            found.troubles.append(trouble)
    return found


def draw(picture: Picture, boxes: list[Box], folder: Path, masks: Sequence[Mask] = ()) -> Path:
    """The picture as it is shown, with a frame and a label for each box, and its mask; kept in folder under a name of all."""
    shapes = [mask.tobytes() for mask in masks]
    name = hashlib.sha256(repr((picture.shown.name, boxes, shapes)).encode()).hexdigest()[:24]
    path = folder / f"{name}.webp"
    if path.is_file():
        return path
    with Image.open(picture.shown) as image:
        drawn = image.convert("RGB")
    drawn = draw_boxes(drawn, boxes, masks)
    drawn.save(path, quality=90)
    return path
