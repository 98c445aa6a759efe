"""InternVL's meta JSON: one file that names several datasets, each with its folder, its share and its limits.

In: {name: {root, annotation, repeat_time, data_augment, max_dynamic_patch, length}}.  Out: Parts.
Paths are sought beside the meta file first, then from where the command runs (as InternVL's own scripts do).
Source: internvl/train/internvl_chat_finetune.py of OpenGVLab/InternVL at 2410d1d, build_datasets.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessella.errors import DataError

MOST_BYTES = 16 << 20  # a meta file is a page; what is larger is data
KNOWN = ("root", "annotation", "repeat_time", "data_augment", "max_dynamic_patch", "length")


@dataclass(frozen=True)
class Part:
    """One dataset of a meta file."""

    name: str
    annotation: Path
    root: Path
    repeat: float = 1.0
    jpeg: bool = False  # data_augment: JPEG compression of quality 75 to 100
    max_tiles: int | None = None
    length: int | None = None  # rows that it should have
    notes: tuple[str, ...] = ()


def read_meta(path: Path) -> list[Part] | None:
    """The parts of a meta file; None when the file is none. Raises DataError for a meta file with a fault."""
    if path.suffix.lower() != ".json" or path.stat().st_size > MOST_BYTES:
        return None
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None  # not one object: the reader of rows names what is wrong
    if not isinstance(raw, dict) or not any(isinstance(entry, dict) and "annotation" in entry for entry in raw.values()):
        return None
    return [_part(path, name, entry) for name, entry in raw.items()]


def _part(path: Path, name: str, entry: Any) -> Part:
    where = f"{path}, {name}"
    if not isinstance(entry, Mapping) or not isinstance(entry.get("annotation"), str):
        raise DataError(f'{where}: no annotation; must be {{"root": folder, "annotation": file, "repeat_time": 1, …}}')
    annotation = _sought(path, entry["annotation"])
    if not annotation.exists():
        raise DataError(f"{where}: annotation {entry['annotation']} is neither beside {path.name} nor here; check the path")
    root = entry.get("root", "")
    repeat, tiles, length = entry.get("repeat_time", 1), entry.get("max_dynamic_patch"), entry.get("length")
    if not isinstance(repeat, int | float) or isinstance(repeat, bool) or not 0 <= repeat < 1e6:
        raise DataError(f"{where}: repeat_time is {repeat!r}, must be a number, 0 or more; 0.5 is a seeded half")
    if tiles is not None and (not isinstance(tiles, int) or not 1 <= tiles <= 40):
        raise DataError(f"{where}: max_dynamic_patch is {tiles!r}, must be a whole number from 1 to 40")
    unknown = [key for key in entry if key not in KNOWN]
    return Part(
        name,
        annotation,
        _sought(path, root) if isinstance(root, str) and root else annotation.parent,
        float(repeat),
        bool(entry.get("data_augment", False)),
        tiles,
        length if isinstance(length, int) else None,
        (f"{where}: {', '.join(unknown)} is not known and is left alone",) if unknown else (),
    )


def _sought(meta: Path, named: str) -> Path:
    beside = meta.parent / named
    return beside if beside.exists() else Path(named)
