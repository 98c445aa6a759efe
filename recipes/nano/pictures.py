"""Pictures and rendered words as tensors, decoded once by a pool of processes.

In: tars of pictures, the parts folder of collect.py.  Out: uint8 tensors on the CPU.
N pictures, S side in px, W words.
"""

import io
import json
import random
import tarfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"  # code of a letter = index + 1; 0 is "no letter"
LONGEST = 8  # letters of a word
WORD_HEIGHT, WORD_WIDTH = 48, 192  # px of a rendered word's mask
CHUNK = 256
EMOJI_PX = 96


@dataclass(frozen=True)
class Words:
    """Rendered words: masks (W, 48, 192), letters under each column (W, 192), codes (W, 8)."""

    masks: Tensor
    columns: Tensor
    codes: Tensor


def read_tar(path: Path, side: int, workers: int) -> tuple[list[str], Tensor]:
    """Every picture of a tar, its shorter side scaled to S and its centre cut out -> names, pixels (N, S, S, 3)."""
    with tarfile.open(path) as tar:
        members = [m for m in tar if m.isfile() and m.name.lower().endswith((".webp", ".png", ".jpg", ".jpeg"))]
    places = [(m.name, m.offset_data, m.size) for m in members]
    chunks = [places[i : i + CHUNK] for i in range(0, len(places), CHUNK)]
    with ProcessPoolExecutor(workers) as pool:
        parts = list(pool.map(_decode, [path] * len(chunks), chunks, [side] * len(chunks)))
    return [name for name, _, _ in places], torch.from_numpy(np.concatenate(parts))


def _decode(path: Path, places: list[tuple[str, int, int]], side: int) -> np.ndarray:
    out = np.empty((len(places), side, side, 3), np.uint8)
    with path.open("rb") as file:
        for i, (_, offset, size) in enumerate(places):
            file.seek(offset)
            out[i] = square(Image.open(io.BytesIO(file.read(size))).convert("RGB"), side)
    return out


def square(image: Image.Image, side: int) -> np.ndarray:
    """Shorter side to S, centre cut out -> (S, S, 3)."""
    scale = side / min(image.size)
    if scale != 1:
        image = image.resize(
            (max(side, round(image.width * scale)), max(side, round(image.height * scale))), Image.Resampling.BICUBIC
        )
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))


def read_emoji(parts: Path, styles: list[str]) -> tuple[list[str], Tensor, Tensor]:
    """Cut-outs of every drawing in these styles -> keys (C,), pixels (N, 4, 96, 96) uint8, class of each (N,)."""
    keys = sorted(json.loads((parts / "names.json").read_text(encoding="utf-8")))
    pixels, classes = [], []
    for style in styles:
        for number, key in enumerate(keys):
            path = next(iter(sorted((parts / "emoji" / style).glob(f"{key}.*"))), None)
            if path is None:
                continue
            image = Image.open(path).convert("RGBA").resize((EMOJI_PX, EMOJI_PX), Image.Resampling.BICUBIC)
            pixels.append(np.asarray(image).transpose(2, 0, 1))
            classes.append(number)
    return keys, torch.from_numpy(np.stack(pixels)), torch.tensor(classes)


def render_words(parts: Path, split: str, count: int, workers: int, seed: int) -> Words:
    """count words of a split ("train" or "held_out") in the fonts of that split."""
    words = json.loads((parts / "words.json").read_text(encoding="utf-8"))[split]
    folder = parts / "fonts" if split == "train" else parts / "fonts" / "held_out"
    fonts = sorted(str(p) for p in folder.iterdir() if p.suffix in (".ttf", ".otf"))
    sizes = [min(500, count - i) for i in range(0, count, 500)]
    seeds = [seed * 1_000_003 + i for i in range(len(sizes))]
    with ProcessPoolExecutor(workers) as pool:
        done = list(pool.map(_render, [words] * len(sizes), [fonts] * len(sizes), sizes, seeds))
    masks, columns, codes = (torch.from_numpy(np.concatenate(part)) for part in zip(*done, strict=True))
    return Words(masks, columns, codes)


def _render(words: list[str], fonts: list[str], count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    chance = random.Random(seed)
    masks = np.zeros((count, WORD_HEIGHT, WORD_WIDTH), np.uint8)
    columns = np.zeros((count, WORD_WIDTH), np.uint8)
    codes = np.zeros((count, LONGEST), np.uint8)
    for i in range(count):
        word = chance.choice(words)
        word = chance.choices([word, word.capitalize(), word.upper()], [0.7, 0.15, 0.15])[0]
        font = ImageFont.truetype(chance.choice(fonts), 34)
        left, top, right, bottom = font.getbbox(word)
        scale = min((WORD_WIDTH - 4) / (right - left), (WORD_HEIGHT - 4) / (bottom - top), 1.0)
        if scale < 1:
            font = font.font_variant(size=int(34 * scale))
            left, top, right, bottom = font.getbbox(word)
        x, y = (WORD_WIDTH - (right - left)) // 2 - left, (WORD_HEIGHT - (bottom - top)) // 2 - top
        image = Image.new("L", (WORD_WIDTH, WORD_HEIGHT))
        ImageDraw.Draw(image).text((x, y), word, fill=255, font=font)
        masks[i] = np.asarray(image)
        for k, letter in enumerate(word):
            code = LETTERS.index(letter) + 1
            codes[i, k] = code
            columns[i, int(x + font.getlength(word[:k])) : int(x + font.getlength(word[: k + 1]))] = code
    return masks, columns, codes
