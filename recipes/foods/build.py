"""Draw the shipped foods again: one small WebP on white for each food and style, and their names.

In: --packages, the folder of unpacked packages that recipes/nano/collect.py reads too.
Out: --out (src/tessella/assets/foods by default): {style}/{key}.webp, 144 px, and foods.json.
A food is an emoji of the category "Food & Drink" (dishes to eat from left out) that all four styles draw and that
CLDR names in English and Chinese.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "nano"))
from collect import annotations, drawing_path, open_drawing, package  # a recipe is no package

SIDE_PX = 144
DRAWING_PX = 128  # a margin all round, the same in each style, so that size does not tell the style
QUALITY = 84
STYLES = {"fluent-3d": "fluent3d", "fluent-flat": "flat", "noto": "noto", "twemoji": "twemoji"}  # shipped name -> package's
DEFAULT_OUT = Path(__file__).parents[2] / "src" / "tessella" / "assets" / "foods"


def key_of(english: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", english.lower()).strip("-")


def on_white(drawing: Image.Image) -> Image.Image:
    """Crop the empty rim, scale the longer side to DRAWING_PX, centre on white."""
    box = drawing.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    drawing = drawing.crop(box)
    scale = DRAWING_PX / max(drawing.size)
    drawing = drawing.resize(
        (max(1, round(drawing.width * scale)), max(1, round(drawing.height * scale))), Image.Resampling.LANCZOS
    )
    page = Image.new("RGB", (SIDE_PX, SIDE_PX), "white")
    page.paste(drawing, ((SIDE_PX - drawing.width) // 2, (SIDE_PX - drawing.height) // 2), drawing)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True, help="folder of unpacked packages")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    english, chinese = annotations(args.packages, "en"), annotations(args.packages, "zh")
    table = json.loads((package(args.packages, "emoji-datasource-google") / "emoji.json").read_text())
    foods = {}
    for row in sorted(table, key=lambda r: r["sort_order"]):
        if row["category"] != "Food & Drink" or row["subcategory"] == "dishware":
            continue
        code = row["unified"].replace("-FE0F", "")
        sign = "".join(chr(int(c, 16)) for c in code.split("-"))
        places = {s: drawing_path(args.packages, name, row["unified"]) for s, name in STYLES.items()}
        if sign not in english or sign not in chinese or not all(places.values()):
            print("left out:", row["short_name"])
            continue
        name = english[sign]["tts"][0]
        foods[key_of(name)] = {"english": name, "chinese": chinese[sign]["tts"][0], "unicode": code.lower()}
        for style, path in places.items():
            assert path is not None
            target = args.out / style / f"{key_of(name)}.webp"
            target.parent.mkdir(parents=True, exist_ok=True)
            on_white(open_drawing(path, 256)).save(target, quality=QUALITY, method=6)
    (args.out / "foods.json").write_text(json.dumps(foods, ensure_ascii=False, indent=1) + "\n")
    size = sum(p.stat().st_size for p in args.out.rglob("*.webp"))
    print(len(foods), "foods,", len(STYLES), "styles,", size, "bytes")


if __name__ == "__main__":
    main()
