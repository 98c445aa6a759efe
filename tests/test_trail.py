"""docs/way-of-an-image.md tells the truth: one picture goes through the six files, and every number on the page is met."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tessella.chat import Message, place_marks
from tessella.checkpoint.builtin import cache_folder, nano_config
from tessella.checkpoint.smollm2 import Gguf, language_base, tokenizer_files
from tessella.errors import DownloadError
from tessella.generate import generate
from tessella.image import TileRule, cut_tiles, open_image
from tessella.inputs import Inputs, ModelInput, Picture
from tessella.model.attend import Causal
from tessella.model.connectors import pixel_shuffle
from tessella.model.vision_language import VisionLanguageModel
from tessella.sampling import SamplingParams
from tessella.tokenizer import Tokenizer
from tiny import tiny_tokenizer

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "way-of-an-image.md").read_text(encoding="utf-8")
PICTURE = DOCS / "three-foods.png"
QUESTION = "What is in this picture?"


def shape(x: Tensor, tokens: int) -> str:
    """(4, 3, 224, 224); a length of T tokens is written T, because it depends on the question."""
    return "(" + ", ".join("T" if n == tokens else str(n) for n in x.shape) + ")"


def prompt_with(tokenizer: Tokenizer) -> ModelInput:
    messages = [Message("user", place_marks(QUESTION, 1))]
    return Inputs(nano_config(), tokenizer).build(messages, [Picture(PICTURE)])


@torch.inference_mode()
def walk(folder: Path) -> list[tuple[str, str, str]]:
    """(file, comes in, goes out) at each stop, from what really came and went. Random weights: only shapes are told."""
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    config = nano_config()
    prompt = prompt_with(Tokenizer.load(folder))
    t = len(prompt)
    rule = TileRule(config.tile_size_px, config.min_tiles, config.max_tiles, config.use_thumbnail)
    tiles = cut_tiles(open_image(PICTURE), rule)
    assert torch.equal(tiles.pixels, prompt.tiles)
    grid, count = tiles.grid, len(tiles.pixels)
    thumbnail = " and the thumbnail" if count > grid.columns * grid.rows else ""
    kind = str(tiles.pixels.dtype).removeprefix("torch.")
    stops = [
        (
            "image.py",
            f"{tiles.width_px} x {tiles.height_px} px",
            f"{count} tiles {shape(tiles.pixels, t)} {kind}: {grid.columns} columns x {grid.rows} row{thumbnail}",
        ),
        (
            "inputs.py",
            f"1 message, {count} tiles",
            f"ids {shape(prompt.ids, t).replace(',', '')}, among them {int(prompt.slots.sum())} slots = "
            f"{count} tiles x {int(prompt.slots.sum()) // count}",
        ),
    ]
    with torch.device("meta"):
        model = VisionLanguageModel(config).eval()
    model.to_empty(device="cpu")
    for weight in model.parameters():
        weight.uniform_(-0.05, 0.05)
    features = model.features(prompt.tiles)
    stops.append(("model/vision.py", f"tiles {shape(prompt.tiles, t)}", f"features {shape(features, t)}"))
    visual = model.mlp1(features)
    embeddings = model.embed(prompt.ids, prompt.slots, visual)
    goes = f"visual tokens {shape(visual, t)}, set into embeddings {shape(embeddings, t)}"
    stops.append(("model/vision_language.py", f"features {shape(features, t)}", goes))
    hidden = model(embeddings, torch.arange(t), Causal([t]), t)
    logits = model.logits(hidden)
    goes = f"hidden states {shape(hidden, t)}, logits {shape(logits, t)}"
    stops.append(("model/language.py", f"embeddings {shape(embeddings, t)}", goes))
    first = next(generate(model, prompt, SamplingParams(max_tokens=1), stop_ids=()))
    assert first == int(logits[-1].argmax())
    stops.append(("generate.py", f"logits {shape(logits, t)}", r"ids, one at a time, until `<\|im_end\|>`"))
    return stops


def told() -> Sequence[tuple[str, str, str]]:
    """The rows of the page's table."""
    return re.findall(r"^\| \d \| `(.+?)` \| (.+?) \| (.+) \|$", PAGE, flags=re.MULTILINE)


def test_the_page_tells_what_comes_in_and_goes_out_of_each_file(tmp_path: Path) -> None:
    assert list(told()) == walk(tmp_path)


def test_the_page_numbers_its_stops_in_order() -> None:
    numbers = re.findall(r"^\| (\d) \|", PAGE, flags=re.MULTILINE)
    headings = re.findall(r"^(\d)\. \*\*`(.+?)`\*\*", PAGE, flags=re.MULTILINE)
    assert numbers == ["1", "2", "3", "4", "5", "6"]
    assert headings == [(number, file) for number, (file, _, _) in zip(numbers, told(), strict=True)]


def test_the_numbers_between_the_stops_hold() -> None:
    config = nano_config()
    side, patch = config.tile_size_px, config.vision.patch_size_px
    folded = pixel_shuffle(torch.zeros(1, side // patch, side // patch, config.vision.hidden_size))
    for words in (
        f"at most {config.max_tiles} tiles",
        f"resized once to {3 * side} x {side} px",
        f"{side // patch} x {side // patch} patches of {patch} px",
        f"{config.vision.hidden_size} become {folded.shape[1]} of {folded.shape[2]}",
        f"table of {config.language.vocab_size} tokens",
    ):
        assert words in " ".join(PAGE.split())


@pytest.mark.weights
def test_the_page_counts_the_tokens_of_the_question(tmp_path: Path) -> None:
    try:
        files = tokenizer_files(Gguf(language_base(cache_folder())))  # fetched on first use
    except DownloadError as error:
        pytest.skip(f"the tokenizer of tessella-nano is not here and cannot be fetched: {error}")

    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert f"**T = {len(prompt_with(Tokenizer.load(tmp_path)))}**" in PAGE
