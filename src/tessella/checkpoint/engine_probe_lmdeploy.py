"""LMDeploy's PyTorch engine on a folder, in an environment of its own: the length of its prompt, its likeliest, its answer.

In and out as engine_probe_vllm.py; LMDeploy gives no ids of prompts, so "ids" holds their number alone.
Run as: python engine_probe_lmdeploy.py FOLDER TALKS OUT TOKENS trust|-. It wants a GPU; it was not run on one (docs/deploy.md).
"""

import json
import sys
from pathlib import Path
from typing import Any

import lmdeploy
from lmdeploy import GenerationConfig, PytorchEngineConfig
from PIL import Image

LIKELIEST = 20


def main(folder: str, talks: Path, out: Path, tokens: int, trust: bool) -> None:
    """Ask each conversation greedily and write what came of it."""
    config = PytorchEngineConfig(dtype="float32", session_len=4096, max_batch_size=1, eager_mode=True)
    pipe = lmdeploy.pipeline(folder, backend_config=config, trust_remote_code=trust)
    settings = GenerationConfig(max_new_tokens=tokens, do_sample=False, logprobs=LIKELIEST)
    found = []
    for talk in json.loads(talks.read_text(encoding="utf-8")):
        said = pipe([as_messages(talk)], gen_config=settings)[0]
        first = {str(token): float(value) for token, value in said.logprobs[0].items()}
        found.append({"prompt": None, "ids": int(said.input_token_len), "first": first, "answer": list(said.token_ids)})
    out.write_text(json.dumps({"version": lmdeploy.__version__, "talks": found}), encoding="utf-8")


def as_messages(talk: dict[str, Any]) -> list[dict[str, Any]]:
    """OpenAI's form, pictures as PIL images in front of the text that they are marked in."""
    pictures = [Image.open(file).convert("RGB") for file in talk["pictures"]]
    messages = []
    for message in talk["messages"]:
        count = message["content"].count("<image>")
        parts: list[dict[str, Any]] = [{"type": "image_data", "image_data": {"data": pictures.pop(0)}} for _ in range(count)]
        text = message["content"].replace("<image>", "<IMAGE_TOKEN>")
        messages.append({"role": message["role"], "content": [*parts, {"type": "text", "text": text}]})
    return messages


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "trust")
