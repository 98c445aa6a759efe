"""Captions and their pictures, to draw from; or an instruction with the picture before and after it, to edit by.

In: JSON lines, {"caption": "a red apple", "picture": "apple.png"} or {"caption": "make it grey", "before": "a.png", "picture":
"b.png"}; paths count from the file's folder or image_root.  Out: a CaptionRequest for each, and what is wrong with the rest.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from tessella.errors import DataError
from tessella.image import LIMIT_MEGAPIXELS, open_image
from tessella.scenes.requests import Asked, make_asked
from tessella.scenes.truth import Truth

KEYS = frozenset(("caption", "picture", "before"))


@dataclass(frozen=True)
class CaptionRequest:
    """One caption; the pictures are opened when it is learned from."""

    place: str
    caption: str
    picture: Path
    before: Path | None = None
    limit_megapixels: float = LIMIT_MEGAPIXELS

    @property
    def key(self) -> str:
        return f"{self.place} {self.caption} {self.picture.name} {self.before}"

    def make(self) -> Asked:
        """Raises ImageError when a picture cannot be opened."""
        picture = open_image(self.picture, limit_megapixels=self.limit_megapixels)
        before = None if self.before is None else open_image(self.before, limit_megapixels=self.limit_megapixels)
        route, kind = ("[GEN]", "draw") if before is None else ("[EDIT]", "edit")
        answer = f"{route}" if before is not None else f"{self.caption}{route}"
        return make_asked(kind, self.caption, answer, before, [Truth(route, self.caption, picture=picture)])


def read_captions(
    path: Path, image_root: Path | None = None, limit_megapixels: float = LIMIT_MEGAPIXELS
) -> tuple[list[CaptionRequest], list[tuple[str, str]]]:
    """(requests, what is skipped: (place, reason)). Raises DataError when the file cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); give JSON lines with caption and picture") from error
    root = path.parent if image_root is None else image_root
    found, skipped = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path.name}:{number}"
        try:
            found.append(_request(place, line, root, limit_megapixels))
        except DataError as error:  # not swallowed: it goes into the ledger, which stops the run when it fills up
            skipped.append((place, str(error)))
    return found, skipped


def _request(place: str, line: str, root: Path, limit_megapixels: float) -> CaptionRequest:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error}") from error
    if not isinstance(row, dict) or not {"caption", "picture"} <= row.keys() <= KEYS:
        raise DataError("no caption row: it must hold caption and picture, and may hold before; nothing else")
    caption = row["caption"]
    if not isinstance(caption, str) or not caption.strip():
        raise DataError("empty caption: say what the picture shows")
    paths = [root / str(row[key]) for key in ("picture", "before") if row.get(key) is not None]
    missing = [str(one) for one in paths if not one.is_file()]
    if missing:
        raise DataError(f"picture missing: {missing[0]}")
    return CaptionRequest(place, caption.strip(), paths[0], paths[1] if len(paths) > 1 else None, limit_megapixels)
