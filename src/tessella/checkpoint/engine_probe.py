"""transformers on a native folder, in a process of its own: its prompts, its ids, its first-token log probabilities.

In: a folder, a JSON file of conversations (messages, picture files), how many tokens to answer.  Out: a JSON file and a
safetensors file. Run as: python engine_probe.py FOLDER TALKS OUT TOKENS -. Nothing of Tessella's own reading is used on the
way: the chat template, the tokenizer, the tiles and the model are all as transformers has them.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

START, SLOT, END = "<img>", "<IMG_CONTEXT>", "</img>"


def main(folder: Path, talks: Path, out: Path, tokens: int) -> None:
    """Ask each conversation and write what came of it: out.json and out.safetensors (row by row, (V,) float32)."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    pictures = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    slots = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))["image_seq_length"]
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    found, rows = [], {}
    for number, talk in enumerate(json.loads(talks.read_text(encoding="utf-8"))):
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        prompt = tokenizer.apply_chat_template(
            talk["messages"], chat_template=template, tokenize=False, add_generation_prompt=True
        )
        inputs, tiles = tokens_of(prompt, talk["pictures"], tokenizer, pictures, slots)
        with torch.inference_mode():
            logits = model(**inputs).logits[0, -1]
            answer = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        rows[str(number)] = logits.float().log_softmax(-1)
        ids = inputs["input_ids"][0].tolist()
        found.append({"prompt": prompt.replace(SLOT, "<image>"), "ids": ids, "tiles": tiles, "answer": answer.tolist()})
    save_file(rows, out.with_suffix(".safetensors"))
    out.write_text(json.dumps({"version": transformers.__version__, "talks": found}), encoding="utf-8")


def tokens_of(prompt: str, files: list[str], tokenizer: Any, processor: Any, slots: int) -> tuple[dict[str, Tensor], list[int]]:
    """What InternVLProcessor makes of a prompt and its pictures. Done here: that class needs torchvision, for videos."""
    tiles: list[int] = []
    inputs: dict[str, Tensor] = {}
    if files:
        cut = processor(images=[Image.open(file) for file in files], return_tensors="pt")
        inputs["pixel_values"], tiles = cut["pixel_values"], [int(count) for count in cut["num_patches"]]
    pieces = prompt.split(SLOT)
    text = pieces[0]
    for count, piece in zip(tiles, pieces[1:], strict=True):
        text += START + SLOT * slots * count + END + piece
    return {**inputs, **tokenizer(text, return_tensors="pt", add_special_tokens=False)}, tiles


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
