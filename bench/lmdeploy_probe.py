"""What LMDeploy's own reading makes of a folder and of conversations, without its engines: they want a GPU, this does not.

In: FOLDER, TALKS (JSON: messages with <image> marks, picture files).  Out: OUT (JSON: prompts, ids) and OUT.safetensors
(the tiles as its vision model would get them). Run by bench/lmdeploy_prompts.py, in LMDeploy's environment.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import lmdeploy
from lmdeploy.archs import get_model_arch
from lmdeploy.model import get_chat_template
from lmdeploy.serve.processors import MultimodalProcessor
from lmdeploy.tokenizer import Tokenizer
from lmdeploy.vl import engine
from PIL import Image
from safetensors.torch import save_file


async def main(folder: str, talks: Path, out: Path) -> None:
    """Each conversation through its chat template, its tokenizer and its cutting of pictures, as its server does it."""
    architecture, _ = get_model_arch(folder, trust_remote_code=True)
    tokenizer = Tokenizer(folder, trust_remote_code=True)
    template = get_chat_template(folder, None, trust_remote_code=True)
    engine.is_bf16_supported = lambda *_: True  # it asks a GPU for the type of the tiles
    encoder = engine.ImageEncoder(folder, "pytorch", trust_remote_code=True)
    processor = MultimodalProcessor(tokenizer, template, vl_encoder=encoder, backend="pytorch")
    found, tiles = [], {}
    for number, talk in enumerate(json.loads(talks.read_text(encoding="utf-8"))):
        seen = await processor.get_prompt_input(as_messages(talk), do_preprocess=True, sequence_start=True)
        found.append({"prompt": seen["prompt"], "ids": [int(one) for one in seen["input_ids"]]})
        for place, picture in enumerate(seen.get("multimodal") or []):
            tiles[f"{number}:{place}"] = picture["pixel_values"].float().contiguous()
    save_file(tiles, out.with_suffix(".safetensors"))
    told = {"version": lmdeploy.__version__, "architecture": architecture, "template": type(template).__name__, "talks": found}
    out.write_text(json.dumps(told), encoding="utf-8")


def as_messages(talk: dict[str, Any]) -> list[dict[str, Any]]:
    """OpenAI's form, pictures as PIL images where they are marked in the text."""
    pictures = [Image.open(file).convert("RGB") for file in talk["pictures"]]
    messages = []
    for message in talk["messages"]:
        count = message["content"].count("<image>")
        parts: list[dict[str, Any]] = [
            {"type": "image_data", "image_data": {"data": pictures.pop(0), **talk["limits"].pop(0)}} for _ in range(count)
        ]
        text = message["content"].replace("<image>", "<IMAGE_TOKEN>")
        messages.append({"role": message["role"], "content": [*parts, {"type": "text", "text": text}] if parts else text})
    return messages


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
