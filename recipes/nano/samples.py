"""One training sample of each kind: a picture (or none), questions with answers, and what counts as right.

In: a random.Random and a Parts.  Out: a Sample; the table KINDS holds every kind and its share in each stage.
"""

import io
import json
import random
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from drawing import (
    COLOURS,
    SHAPES,
    SIDE_PX,
    Parts,
    Photo,
    distance,
    lay,
    named_colour,
    object_page,
    page_away_from,
    scaled,
    scatter,
    shape,
    word_picture,
)
from PIL import Image

QUALITY = 90  # JPEG
AS_IT_IS = 0.4  # share of photographs copied as they are; the others are cropped and mirrored
MORE_TURNS = 0.4  # share of counted pictures that are also named
SPELLED, NONSENSE = 0.3, 0.12  # shares of word samples that ask for letters; whose letters form no word
ZH_SHARE = 0.3
LISTS = tomllib.loads(Path(__file__).with_name("parts.toml").read_text(encoding="utf-8"))
ASK: dict[str, list[str]] = LISTS["ask"]


@dataclass(frozen=True)
class Sample:
    """A picture as the bytes of its file (None: text only), turns of (question, answer), right answers to the first."""

    picture: bytes | None
    ending: str
    turns: tuple[tuple[str, str], ...]
    answers: tuple[str, ...]


def drawn(page: Image.Image, *turns: tuple[str, str]) -> Sample:
    file = io.BytesIO()
    page.save(file, "JPEG", quality=QUALITY)
    return Sample(file.getvalue(), "jpg", turns, (turns[0][1],))


def pick(rng: random.Random, asks: list[str], plain: bool) -> str:
    """One phrasing; always the first when the sample is a measurement."""
    return asks[0] if plain else rng.choice(asks)


# ---------------------------------------------------------------- naming


def synonyms(names: str) -> tuple[str, ...]:
    """ "rocking chair, rocker" -> ("rocking chair", "rocker"): the first, in small letters, is the one taught."""
    return tuple(n.strip().lower() for n in names.split(","))


def changed(rng: random.Random, photo: Photo) -> tuple[bytes, str]:
    """A photograph as it is, or a square of it, perhaps mirrored."""
    image = photo.open()
    if min(image.size) <= 64 and rng.random() < AS_IT_IS:
        return photo.read(), "webp"
    side = int(min(image.size) * rng.uniform(0.65, 1.0))
    x, y = rng.randint(0, image.width - side), rng.randint(0, image.height - side)
    image = image.crop((x, y, x + side, y + side))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    target = 64 if side <= 64 else SIDE_PX
    file = io.BytesIO()
    image.resize((target, target), Image.Resampling.BICUBIC).save(file, "JPEG", quality=93)
    return file.getvalue(), "jpg"


def photo(rng: random.Random, parts: Parts, plain: bool) -> Sample:
    draw = rng.random()
    if draw < 0.92:
        found = rng.choice(parts.tiny)
        names = synonyms(parts.wordnet[found.label])
        turns: tuple[tuple[str, str], ...] = ((pick(rng, ASK["photo"], plain), names[0]),)
    elif draw < 0.96:
        found = rng.choice(parts.one_each)
        names = (found.label.lower(),)
        turns = ((pick(rng, ASK["photo"], plain), names[0]),)
    else:
        found = rng.choice(parts.dishes)
        names = (found.label.replace("_", " "),)
        chinese = LISTS["dishes"].get(names[0])
        if chinese and rng.random() < ZH_SHARE:
            names, turns = (chinese,), (("图中是什么食物？", chinese),)
        else:
            turns = ((pick(rng, ASK["dish"], plain), names[0]),)
    picture, ending = changed(rng, found)
    return Sample(picture, ending, turns, names)


def held_out_photo(photo_file: Photo, wordnet: dict[str, str]) -> Sample:
    names = synonyms(wordnet[photo_file.label])
    return Sample(photo_file.read(), "webp", ((ASK["photo"][0], names[0]),), names)


def emoji(rng: random.Random, parts: Parts, plain: bool) -> Sample:
    """One drawing, English name, Chinese name, or both."""
    code, name = rng.choice(list(parts.names.items()))
    page = object_page(rng, parts, 0.15)
    cut = scaled(parts.emoji(rng.choice(parts.styles), code), rng.randint(70, 214))
    if rng.random() < 0.3:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    lay(page, cut, rng.randint(2, SIDE_PX - cut.width - 2), rng.randint(2, SIDE_PX - cut.height - 2))
    english, chinese = (pick(rng, ASK["emoji"], plain), name["en"]), (pick(rng, ASK["zh"], plain), name["zh"])
    draw = rng.random()
    if draw < ZH_SHARE:
        return drawn(page, chinese)
    return drawn(page, english, chinese) if draw < 2 * ZH_SHARE else drawn(page, english)


# ---------------------------------------------------------------- reading


def any_word(rng: random.Random, words: list[str], never: frozenset[str]) -> str:
    """A word; commoner ones more often; at times letters that form none, so that letters are read, not guessed."""
    if rng.random() < NONSENSE:
        a, b = rng.choice(words), rng.choice(words)
        made = (a[: len(a) // 2 + 1] + b[len(b) // 2 :])[:8]
        return a if made in never else made
    return rng.choice(words) if rng.random() < 0.7 else words[int(len(words) * rng.random() ** 2)]


def written(rng: random.Random, word: str) -> str:
    draw = rng.random()
    return word if draw < 0.8 else word.capitalize() if draw < 0.92 else word.upper()


def word(rng: random.Random, parts: Parts, plain: bool) -> Sample:
    """Read one word, or its letters; held-out words, half of them in held-out fonts, when it is a measurement."""
    if plain:
        text = written(rng, rng.choice(parts.words["held_out"]))
        face = rng.choice(parts.held_out_fonts if rng.random() < 0.5 else parts.fonts)
        return drawn(word_picture(rng, parts, text, face), (ASK["word"][0], text))
    text = written(rng, any_word(rng, parts.words["train"], parts.unseen_words))
    page = word_picture(rng, parts, text, rng.choice(parts.fonts))
    read, spell = (pick(rng, ASK["word"], plain), text), (pick(rng, ASK["letters"], plain), " ".join(text))
    return drawn(page, read) if rng.random() > SPELLED else drawn(page, *rng.choice([(spell,), (read, spell), (spell, read)]))


# ---------------------------------------------------------------- counting, placing, colours


@cache
def _codes(parts_folder: Path) -> dict[str, str]:
    names = json.loads((parts_folder / "names.json").read_text())
    by_name = {row["en"]: code for code, row in names.items()}
    return {name: by_name[name] for name in LISTS["objects"] if name in by_name}


def plural(noun: str) -> str:
    if noun in LISTS["plurals"]:
        return LISTS["plurals"][noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("f"):
        return noun[:-1] + "ves"
    return noun[:-1] + "ies" if noun.endswith("y") and noun[-2] not in "aeiou" else noun + "s"


def count(rng: random.Random, parts: Parts, plain: bool) -> Sample:
    """One to five of the same thing, none over another."""
    number = rng.randint(1, 5)
    base = rng.randint(34, 64)
    sizes = [max(28, min(70, round(base * rng.uniform(0.85, 1.15)))) for _ in range(number)]
    named = rng.random() < 0.7
    if named:
        noun, code = rng.choice(list(_codes(parts.folder).items()))
        drawing = parts.emoji(rng.choice(parts.styles), code)
        cuts = [scaled(drawing, px) for px in sizes]
        page = object_page(rng, parts, 0.0)
    else:
        kind, colour_name = rng.choice(SHAPES), rng.choice(list(COLOURS))
        colour = named_colour(rng, colour_name)
        cuts = [shape(kind, colour, px) for px in sizes]
        noun = kind if rng.random() < 0.5 else f"{colour_name} {kind}"
        page = page_away_from(rng, [colour], 90)
    boxes = scatter(rng, cuts)
    if boxes is None:
        return count(rng, parts, plain)
    for cut, box in zip(cuts, boxes, strict=True):
        lay(page, cut, box.x, box.y)
    things = plural(noun) if noun != "scissors" else "pairs of scissors"
    turns = [(pick(rng, ASK["count"], plain).format(things), str(number))]
    if named and not plain and rng.random() < MORE_TURNS:  # the picture is paid for: what is counted is named too
        turns.insert(rng.randint(0, 1), (pick(rng, ASK["emoji"], plain), noun))
    return drawn(page, *turns)


def place(rng: random.Random, parts: Parts, plain: bool) -> Sample:
    """Two different things, one clearly left, right, above or below the other."""
    if rng.random() < 0.75:
        chosen = rng.sample(list(_codes(parts.folder).items()), 2)
        nouns = [noun for noun, _ in chosen]
        style = rng.choice(parts.styles)
        cuts = [scaled(parts.emoji(style, code), rng.randint(56, 92)) for _, code in chosen]
        page = object_page(rng, parts, 0.05)
    else:
        kinds, tints = rng.sample(SHAPES, 2), rng.sample(list(COLOURS), 2)
        inks = [named_colour(rng, t) for t in tints]
        cuts = [shape(k, c, rng.randint(50, 84)) for k, c in zip(kinds, inks, strict=True)]
        nouns = [f"{t} {k}" for t, k in zip(tints, kinds, strict=True)] if rng.random() < 0.6 else list(kinds)
        page = page_away_from(rng, inks, 80)
    boxes = scatter(rng, cuts, gap=2)
    if boxes is None:
        return place(rng, parts, plain)
    (ax, ay), (bx, by) = ((b.x + b.width / 2, b.y + b.height / 2) for b in boxes)
    across, down = bx - ax, by - ay
    if max(abs(across), abs(down)) < 50:
        return place(rng, parts, plain)
    for cut, box in zip(cuts, boxes, strict=True):
        lay(page, cut, box.x, box.y)
    turns = _places(rng, nouns, across, down, plain)
    rng.shuffle(turns)
    return drawn(page, *(turns[:1] if plain else turns[: rng.randint(1, 4)]))


def _places(rng: random.Random, nouns: list[str], across: float, down: float, plain: bool) -> list[tuple[str, str]]:
    """Every question whose answer is beyond doubt (48 px apart; four ways only when one way is twice the other)."""
    a, b = nouns
    side, level = ("left" if across > 0 else "right"), ("above" if down > 0 else "below")
    swapped = {"left": "right", "right": "left", "above": "below", "below": "above"}
    turns = []
    if abs(across) >= 48:
        turns += [(pick(rng, ASK["side"], plain).format(a, b), side), (pick(rng, ASK["side"], plain).format(b, a), swapped[side])]
    if abs(down) >= 48:
        turns += [
            (pick(rng, ASK["level"], plain).format(a, b), level),
            (pick(rng, ASK["level"], plain).format(b, a), swapped[level]),
        ]
    if max(abs(across), abs(down)) >= 2 * min(abs(across), abs(down)):
        way = side if abs(across) > abs(down) else level
        turns += [(ASK["where"][0].format(a, b), way), (ASK["where"][0].format(b, a), swapped[way])]
    return turns


def colour(rng: random.Random, parts: Parts, plain: bool) -> Sample:
    """One to three shapes of different kinds and colours; asked for a colour or for a shape."""
    number = rng.randint(1, 3)
    kinds, tints = rng.sample(SHAPES, number), rng.sample(list(COLOURS), number)
    inks = [named_colour(rng, t) for t in tints]
    top = {1: 180, 2: 104, 3: 88}[number]
    cuts = [shape(k, c, rng.randint(40, top)) for k, c in zip(kinds, inks, strict=True)]
    page = page_away_from(rng, inks, 70)
    boxes = scatter(rng, cuts)
    if boxes is None or any(distance(page.getpixel((b.x, b.y)), c) < 40 for b, c in zip(boxes, inks, strict=True)):
        return colour(rng, parts, plain)
    for cut, box in zip(cuts, boxes, strict=True):
        lay(page, cut, box.x, box.y)
    turns = [(pick(rng, ASK["colour"], plain).format(k), t) for k, t in zip(kinds, tints, strict=True)]
    if plain:
        sample = drawn(page, turns[0])
        return replace(sample, answers=("grey", "gray")) if tints[0] == "grey" else sample
    turns += [(pick(rng, ASK["shape"], plain).format(t), k) for k, t in zip(kinds, tints, strict=True)]
    rng.shuffle(turns)
    return drawn(page, *turns[: rng.randint(1, 5)])


# ---------------------------------------------------------------- talking


@cache
def _chat(path: Path) -> list[list[dict]]:
    return [json.loads(line)["messages"] for line in path.read_text().splitlines()]


def chat(rng: random.Random, parts: Parts, plain: bool) -> Sample:
    messages = rng.choice(_chat(Path(__file__).parent / "chat.jsonl"))
    user, assistant = (m["content"] for m in messages)
    return Sample(None, "", ((user, assistant),), (assistant,))


@dataclass(frozen=True)
class Kind:
    """How a sample of this kind is made, and its share in each stage."""

    make: Callable[[random.Random, Parts, bool], Sample]
    align: float
    instruct: float
    again: float


KINDS = {
    "photo": Kind(photo, 0.30, 0.23, 0.15),
    "emoji": Kind(emoji, 0.12, 0.13, 0.14),
    "word": Kind(word, 0.30, 0.34, 0.52),
    "count": Kind(count, 0.09, 0.09, 0.07),
    "place": Kind(place, 0.11, 0.12, 0.05),
    "colour": Kind(colour, 0.08, 0.07, 0.03),
    "chat": Kind(chat, 0.0, 0.02, 0.04),
}
SKILLS = {"words": word, "counting": count, "relations": place, "colours": colour}  # measured beside the naming of photographs
