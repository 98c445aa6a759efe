"""vLLM on a folder, in an environment of its own: its prompt's ids, its first token's likeliest, its greedy answer.

In: a folder, a JSON file of conversations (messages, picture files), how many tokens to answer, and whether to let the folder's
own code read its config ("trust"; the caller lays only Tessella's code there).  Out: a JSON file.
Run as: python engine_probe_vllm.py FOLDER TALKS OUT TOKENS trust|-. It imports nothing of Tessella's, which is not there.
"""

import base64
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

LIKELIEST = 20  # as many as vLLM gives unasked
MARK = "<image>"
LABEL = re.compile(r"Image-\d+: $")


def main(folder: str, talks: Path, out: Path, tokens: int, trust: bool) -> None:
    """Ask each conversation in float32, greedily, and write what came of it."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process: its errors are ours to tell
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import vllm  # reads the environment

    asked = json.loads(talks.read_text(encoding="utf-8"))
    engine = vllm.LLM(
        model=folder,
        dtype="float32",
        enforce_eager=True,
        trust_remote_code=trust,
        max_model_len=4096,
        max_num_seqs=1,
        limit_mm_per_prompt={"image": max([1, *(len(talk["pictures"]) for talk in asked)])},
    )
    params = vllm.SamplingParams(temperature=0, max_tokens=tokens, logprobs=LIKELIEST)
    found = []
    for talk in asked:
        (answer,) = engine.chat([as_parts(talk)], params, use_tqdm=False)
        said = answer.outputs[0]
        first = {str(token): one.logprob for token, one in said.logprobs[0].items()}
        found.append({"prompt": None, "ids": list(answer.prompt_token_ids), "first": first, "answer": list(said.token_ids)})
    out.write_text(json.dumps({"version": vllm.__version__, "talks": found}), encoding="utf-8")


def as_parts(talk: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation as clients write it: text and pictures in parts, in their order; the template labels several pictures."""
    pictures = iter(talk["pictures"])
    messages = []
    for message in talk["messages"]:
        parts: list[dict[str, Any]] = []
        for number, text in enumerate(message["content"].split(MARK)):
            if number:
                data = base64.b64encode(Path(next(pictures)).read_bytes()).decode()
                parts.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
            text = LABEL.sub("", text.removeprefix("\n") if number else text)
            if text:
                parts.append({"type": "text", "text": text})
        messages.append({"role": message["role"], "content": parts})
    return messages


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "trust")
