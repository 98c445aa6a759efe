"""What an answer shows beside its words, in the terminal: boxes as lines, masks and pictures as files next to the picture.

In: the answer's text, what its routing tokens gave, and the picture it is about.  Out: lines, and files that are named in them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path

import numpy as np
from PIL import Image

from tessella.decode import Shown
from tessella.errors import WriteError
from tessella.files import cannot_write
from tessella.image import open_image
from tessella.marks import Box, Mask, boxes_in, draw_boxes


@dataclass
class Files:
    """Where the files of one answer go: dish-answer2-boxes.png beside dish.jpg, or in the current folder without a picture.

    Files of an earlier sitting stay: where they have the answer's number, the next free one is taken.
    """

    picture: Path | None
    answer: int
    written: list[str] = field(default_factory=list)

    def save(self, image: Image.Image, what: str) -> str:
        """Raises WriteError when the folder takes no file."""
        folder, stem = (Path(), "drawn") if self.picture is None else (self.picture.parent, self.picture.stem)
        while not self.written and any(folder.glob(f"{escape(stem)}-answer{self.answer}-*.png")):
            self.answer += 1
        path = folder / f"{stem}-answer{self.answer}-{what}.png"
        try:
            image.save(path)
        except OSError as error:
            raise cannot_write(path, error) from error
        self.written.append(str(path))
        return str(path)


def show(text: str, shown: Sequence[Shown], files: Files) -> list[str]:
    """The lines that tell what was found, after its files were written; none for an answer that marks nothing."""
    lines: list[str] = []
    boxes, masks = boxes_in(text), list[Mask]()
    first_mask = len(boxes)
    for one in shown:
        lines += _told(one, len(boxes) + 1)
        boxes += one.boxes()
        masks += [found.mask.numpy() for found in one.objects]
    try:
        for number, picture in enumerate([one.picture for one in shown if one.picture is not None], 1):
            lines.append(f"written: {files.save(picture, f'picture{number}')}")
        if files.picture is not None and boxes:
            lines.append(f"written: {_drawn(files, files.picture, boxes, masks, first_mask)}")
            for number, mask in enumerate(masks, first_mask + 1):
                lines.append(f"written: {files.save(Image.fromarray(mask.astype(np.uint8) * 255), f'mask{number}')}")
    except WriteError as error:  # the words were said; what cannot be kept is told
        lines.append(str(error))
    return lines


def _told(one: Shown, first: int) -> list[str]:
    """A line for each object: its number in the drawing, its box in thousandths, how sure the decoder is."""
    if one.trouble:
        return [f"{one.route} {one.label}: {one.trouble}"]
    if one.picture is not None:
        return [f"{one.route} {one.label}: a picture of {one.picture.width} x {one.picture.height} px"]
    if not one.objects:
        return [f"{one.route} {one.label}: nothing found"]
    return [
        f"{number}  {box.label}  [{box.x1}, {box.y1}, {box.x2}, {box.y2}]  {found.score:.0%}"
        for number, (box, found) in enumerate(zip(one.boxes(), one.objects, strict=True), first)
    ]


def _drawn(files: Files, picture: Path, boxes: Sequence[Box], masks: Sequence[Mask], first_mask: int) -> str:
    """The picture with all boxes, and the masks in the colours of theirs."""
    image = open_image(picture)
    none = np.zeros((1, 1), dtype=np.bool_)
    return files.save(draw_boxes(image, boxes, [none] * first_mask + list(masks)), "boxes")
