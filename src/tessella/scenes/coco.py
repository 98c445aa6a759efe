"""One's own pictures with boxes and masks, from a COCO-style JSON file.

In: images, annotations (bbox, segmentation as polygons or run lengths) and categories.  Out: a CocoRequest for each picture, and
what is wrong with the rest, by annotation. A box that reaches over the picture's edge is cut at it; one that lies outside, has
no area or runs backwards is a fault, and so is a mask of another size than its picture.
Source: cocodataset.org/#format-data; cocodataset/cocoapi.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tessella.errors import DataError
from tessella.image import LIMIT_MEGAPIXELS, open_image
from tessella.scenes.compose import Kit
from tessella.scenes.requests import Asked, make_asked, name_list, phrase, said
from tessella.scenes.truth import Box, Mask, Truth


@dataclass(frozen=True, eq=False)
class Marked:
    """One annotation that is sound."""

    label: str
    box: Box
    segmentation: Any  # polygons, run lengths, or None


@dataclass(frozen=True, eq=False)
class CocoPicture:
    path: Path
    width: int
    height: int
    marked: tuple[Marked, ...]


@dataclass(frozen=True, eq=False)
class CocoRequest:
    """What is asked of one's own picture: everything in it, some classes, or an outline; opened when it is asked for."""

    picture: CocoPicture
    number: int
    seed: int
    language: str = "en"
    limit_megapixels: float = LIMIT_MEGAPIXELS

    @property
    def place(self) -> str:
        return str(self.picture.path)

    @property
    def key(self) -> str:
        return f"{self.picture.path.name} {self.number} {len(self.picture.marked)} {self.seed}"

    def make(self) -> Asked:
        """Raises ImageError when the picture cannot be opened, DataError when it has another size than the file says."""
        image = open_image(self.picture.path, limit_megapixels=self.limit_megapixels)
        if image.size != (self.picture.width, self.picture.height):
            raise DataError(
                f"{self.picture.path} is {image.width} x {image.height} px, the COCO file says {self.picture.width} x "
                f"{self.picture.height}; its boxes would not fit"
            )
        chance = Kit(("",), seed=self.seed).chance(self.number, f"coco {self.picture.path.name}")
        classes: dict[str, list[Marked]] = defaultdict(list)
        for one in self.picture.marked:
            classes[one.label].append(one)
        if not classes:
            nothing = {"en": "There is nothing to detect.", "zh": "没有可以检测的东西。"}[self.language]
            return make_asked("everything", phrase("everything", self.language, chance), nothing, image, ())
        kind = chance.choice(("everything", "detect", "segment"))
        chosen = list(classes) if kind == "everything" else chance.sample(list(classes), chance.randint(1, min(3, len(classes))))
        if kind == "segment" and any(one.segmentation is None for one in classes[chosen[0]]):
            kind = "detect"
        chosen = chosen[:1] if kind == "segment" else chosen
        route = "[SEG]" if kind == "segment" else "[DET]"
        truths = [self._truth(route, label, classes[label]) for label in chosen]
        question = phrase(kind, self.language, chance).format(name=chosen[0], names=name_list(chosen, self.language))
        return make_asked(kind, question, said(truths, self.language), image, truths)

    def _truth(self, route: str, label: str, some: Sequence[Marked]) -> Truth:
        known = all(one.segmentation is not None for one in some)
        masks = [mask_of(one.segmentation, self.picture.height, self.picture.width) for one in some] if known else []
        return Truth(route, label, tuple(one.box for one in some), tuple(masks))


def read_coco(path: Path, image_root: Path | None = None) -> tuple[list[CocoPicture], list[tuple[str, str]]]:
    """(pictures, what is skipped: (place, reason)). Raises DataError when the file is no COCO file."""
    raw = _read(path)
    root = path.parent if image_root is None else image_root
    names = {row.get("id"): str(row.get("name", "")).strip() for row in raw["categories"]}
    skipped: list[tuple[str, str]] = []
    images: dict[Any, Mapping[str, Any]] = {}
    for row in raw["images"]:
        place = f"{path.name}, image {row.get('id')}"
        if not all(isinstance(row.get(key), int) and row[key] > 0 for key in ("width", "height")):
            skipped.append((place, f"no size: width {row.get('width')}, height {row.get('height')}; both must be above 0"))
        elif not (root / str(row.get("file_name"))).is_file():
            skipped.append((place, f"picture missing: {root / str(row.get('file_name'))}"))
        else:
            images[row["id"]] = row
    marked: dict[Any, list[Marked]] = defaultdict(list)
    for row in raw["annotations"]:
        place = f"{path.name}, annotation {row.get('id')}"
        image = images.get(row.get("image_id"))
        if image is None:
            skipped.append((place, f"no such image: {row.get('image_id')}"))
            continue
        try:
            if not row.get("iscrowd"):  # a crowd is no object that can be counted
                marked[row["image_id"]].append(_marked(row, names, image["width"], image["height"]))
        except DataError as error:  # not swallowed: it goes into the ledger, which stops the run when it fills up
            skipped.append((place, str(error)))
    pictures = [
        CocoPicture(root / str(row["file_name"]), row["width"], row["height"], tuple(marked[key])) for key, row in images.items()
    ]
    return pictures, skipped


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}); give a COCO-style file") from error
    wanted = ("images", "annotations", "categories")
    if not isinstance(raw, dict) or not all(
        isinstance(raw.get(key), list) and all(isinstance(row, dict) for row in raw[key]) for key in wanted
    ):
        raise DataError(f"{path} is no COCO-style file: it must hold lists of objects named {', '.join(wanted)}")
    if not raw["images"]:
        raise DataError(f"{path} holds no images; give a file with at least one")
    return raw


def _marked(row: Mapping[str, Any], names: Mapping[Any, str], width: int, height: int) -> Marked:
    label = names.get(row.get("category_id"), "")
    if not label:
        raise DataError(f"no class: category {row.get('category_id')} has no name")
    segmentation = row.get("segmentation") or None
    box = _box(row.get("bbox"), width, height)
    if isinstance(segmentation, Mapping):
        size = segmentation.get("size")
        if size != [height, width]:
            raise DataError(f"mask of another size: {size}, the picture is [{height}, {width}] (height, width)")
    elif segmentation is not None and not all(isinstance(one, list) and len(one) >= 6 for one in segmentation):
        raise DataError("broken polygon: each must be a list of at least three points, x and y in turn")
    return Marked(label, box, segmentation)


def _box(raw: Any, width: int, height: int) -> Box:
    if not (isinstance(raw, list) and len(raw) == 4 and all(isinstance(side, int | float) for side in raw)):
        raise DataError(f"broken box: {raw}, must be [left, top, width, height] in pixels")
    left, top, wide, high = raw
    if wide <= 0 or high <= 0:
        raise DataError(f"box without area, or backwards: {raw}; width and height must be above 0")
    box = Box(max(left, 0) / width, max(top, 0) / height, min(left + wide, width) / width, min(top + high, height) / height)
    if box.right <= box.left or box.bottom <= box.top:
        raise DataError(f"box outside the picture: {raw}, the picture is {width} x {height} px")
    return box


def mask_of(segmentation: Any, height: int, width: int) -> Mask:
    """Polygons or run lengths -> a mask of the picture's size, by pycocotools."""
    from pycocotools import mask as masks  # an extra, needed for COCO files alone

    if isinstance(segmentation, Mapping):
        code = segmentation
        if isinstance(code["counts"], list):
            code = masks.frPyObjects(dict(code), height, width)
        return np.asarray(masks.decode(code), dtype=np.bool_)
    return np.asarray(masks.decode(masks.merge(masks.frPyObjects(segmentation, height, width))), dtype=np.bool_)
