"""What a decoder should give: the objects behind one routing token of an answer, or the picture.

Boxes are left, top, right, bottom as shares of the picture's width and height; masks cover the whole picture.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

Mask = np.ndarray[Any, np.dtype[np.bool_]]  # (height, width)


class Box(NamedTuple):
    """Shares of the picture's width and height."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True, eq=False)
class Truth:
    """Behind one routing token: every object of the class, or what is to be drawn. No object at all is an answer too."""

    route: str  # "[DET]", …
    label: str
    boxes: tuple[Box, ...] = ()
    masks: tuple[Mask, ...] = field(default=(), repr=False)  # one a box; or none where nobody knows them
    picture: Image.Image | None = None


def box_of(mask: Mask) -> Box:
    """The smallest box around a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    height, width = mask.shape
    return Box(columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height)


def overlap_of_masks(a: Mask, b: Mask) -> float:
    """Intersection over union of two masks of one shape; two empty ones are equal."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


def overlap_of_boxes(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    width, height = min(a.right, b.right) - max(a.left, b.left), min(a.bottom, b.bottom) - max(a.top, b.top)
    both = max(width, 0.0) * max(height, 0.0)
    union = _area(a) + _area(b) - both
    return both / union if union > 0 else 0.0


def _area(box: Box) -> float:
    return max(box.right - box.left, 0.0) * max(box.bottom - box.top, 0.0)
