"""The foods that are shipped with the package: what the demo teaches, drawn in four styles.

In: a style and a food's key.  Out: its names in English and Chinese, and the path of its picture (144 px WebP on white).
Names come from Unicode CLDR; whose drawings these are is told in NOTICE. recipes/foods/build.py draws them again.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tessella.errors import DataError

FOLDER = Path(__file__).parent / "assets" / "foods"
STYLES = ("fluent-3d", "fluent-flat", "noto", "twemoji")


@dataclass(frozen=True)
class Food:
    """One food: key "red-apple", English "red apple", Chinese "红苹果"."""

    key: str
    english: str
    chinese: str


@cache
def foods() -> tuple[Food, ...]:
    """Every shipped food, in the order of the Unicode charts: fruit, vegetables, dishes, sweets, drinks.

    Raises DataError when the package was installed without its pictures.
    """
    try:
        rows = json.loads((FOLDER / "foods.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{FOLDER / 'foods.json'} is not there: install tessella again, its pictures are part of it") from error
    return tuple(Food(key, row["english"], row["chinese"]) for key, row in rows.items())


def picture(food: Food, style: str) -> Path:
    """Where a food's drawing lies.

    Raises DataError for a style that is not shipped, and for a food whose file is missing.
    """
    if style not in STYLES:
        raise DataError(f"style '{style}' is not shipped; there are {', '.join(STYLES)}")
    path = FOLDER / style / f"{food.key}.webp"
    if not path.is_file():
        raise DataError(f"no picture of '{food.key}' at {path}: foods() lists the {len(foods())} that are shipped")
    return path
