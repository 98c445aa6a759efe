"""Does llama.cpp answer like us? `convert --to gguf` with every number in float32, and both are asked.

In: a model that convert takes, and a place to work in.  Out: a table.

    pip install xllamacpp
    python bench/llama_cpp.py tessella-nano WORK
"""

import argparse
import base64
import io
from pathlib import Path
from typing import Any

import xllamacpp
from PIL import Image

from tessella.chat import Message
from tessella.checkpoint.convert import Wish, convert
from tessella.checkpoint.engines import followed
from tessella.checkpoint.gguf_write import LANGUAGE_FILE, TOWER_FILE
from tessella.checkpoint.read import Loaded, load
from tessella.checkpoint.verify import logits_on
from tessella.generate import generate
from tessella.inputs import Picture
from tessella.sampling import SamplingParams

ANSWER_TOKENS = 24


def server(language: Path, tower: Path) -> Any:
    """llama.cpp with its keys and values in float32."""
    params = xllamacpp.CommonParams()
    params.model.path, params.mmproj.path = str(language), str(tower)
    params.n_ctx, params.n_parallel, params.warmup = 2048, 1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cpuparams.n_threads = 1
    return xllamacpp.Server(params)


def row(loaded: Loaded, theirs: Any, name: str, message: Message, pictures: list[Image.Image], **limits: int) -> str:
    """One question, asked of both."""
    ours = loaded.inputs.build([message], [Picture(picture, **limits) for picture in pictures])
    ids = list(generate(loaded.model, ours, SamplingParams(max_tokens=ANSWER_TOKENS), loaded.stop_ids))
    content: Any = message.text
    if pictures:
        text = {"type": "text", "text": message.text.replace("<image>", "")}
        content = [*({"type": "image_url", "image_url": {"url": data_uri(picture)}} for picture in pictures), text]
    request = {"messages": [{"role": "user", "content": content}], "max_tokens": ANSWER_TOKENS, "temperature": 0, "top_k": 1}
    answer = theirs.handle_chat_completions({**request, "logprobs": True, "top_logprobs": 20, "cache_prompt": False})
    said = answer["choices"][0]["logprobs"]["content"]
    # Their list leaves tokens out that are no whole character; what it begins with may be our second or third token.
    place = next((i for i, token in enumerate(ids) if token == said[0]["id"]), 0)
    wanted = logits_on(loaded.model, [followed(ours, ids[:place])])[0][-1].log_softmax(-1)
    difference = max(abs(float(wanted[one["id"]]) - one["logprob"]) for one in said[0]["top_logprobs"])
    mine, other = (
        [one for one in found if "\ufffd" not in loaded.tokenizer.decode([one])] for found in (ids, [one["id"] for one in said])
    )
    same = "yes" if mine == other else "no"
    return f"| {name} | {len(ours)} | {answer['usage']['prompt_tokens']} | {difference:.2g} | {same} |"


def data_uri(picture: Image.Image) -> str:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("work", type=Path)
    told = parser.parse_args()
    loaded = load(told.model, device="cpu", dtype="float32")
    out = convert(told.model, told.work, Wish(to="gguf", dtype="float32", force=True)).folder
    side = loaded.config.tile_size_px
    square = Image.linear_gradient("L").resize((side, side)).convert("RGB")
    wide = Image.radial_gradient("L").resize((2 * side, side)).convert("RGB")
    asked = Message("user", "<image>\nWhat is in this picture?")
    theirs = server(out / LANGUAGE_FILE, out / TOWER_FILE)
    print("| question | our tokens | theirs | largest difference of 20 log probabilities | same answer |")
    print("| --- | --- | --- | --- | --- |")
    print(row(loaded, theirs, "text", Message("user", "What is the capital of France?"), []))
    print(row(loaded, theirs, "one tile", asked, [square], max_tiles=1))
    print(row(loaded, theirs, "two tiles and the thumbnail", asked, [wide]), flush=True)


if __name__ == "__main__":
    main()
