"""The engine's speed beside transformers' own generate called one by one: same weights, same prompts, same run.

    python bench/engine.py --model tessella-nano --streams 8

Half of the prompts have a picture of one tile. Prints a table; --json PATH writes the numbers. bench/shapes.py measures
the shapes of InternVL2-2B on a GPU.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from peer import native_model, one_by_one
from work import ask, picture_questions, questions

from tessella.checkpoint.read import Loaded, load
from tessella.engine.engine import Engine
from tessella.engine.request import EngineSettings
from tessella.evaluate.provenance import provenance
from tessella.image import Size
from tessella.sampling import SamplingParams


@dataclass(frozen=True)
class Options:
    model: str = "tessella-nano"  # a folder, or the built-in model
    streams: int = 8  # prompts side by side
    tokens: int = 64  # of each answer
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None  # of the CPU; None: torch's own number
    rounds: int = 3  # each way is measured that many times in turn; the best counts
    json: Path | None = None


def main(options: Options) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    loaded = load(options.model, device=options.device, dtype=options.dtype)
    pictures = options.streams // 2
    prompts = questions(loaded.inputs, options.streams - pictures)
    side = loaded.config.tile_size_px
    prompts += picture_questions(loaded.inputs, pictures, Size(side, side), 1)
    params = SamplingParams(max_tokens=options.tokens)
    theirs, ours = [], []
    peer = native_model(loaded)
    one_by_one(peer, prompts[:1], 4)
    for _ in range(options.rounds):
        ids, seconds = one_by_one(peer, prompts, options.tokens)
        theirs.append(len(prompts) * options.tokens / seconds)
        run = measured(loaded, prompts, params)
        ours.append(run.tokens_per_second)
    equal = sum(a == b.ids for a, b in zip(ids, run.answers, strict=True))
    tell(options, loaded, max(theirs), max(ours), equal, sorted(run.seconds_to_first)[len(prompts) // 2])


def measured(loaded: Loaded, prompts, params):  # type: ignore[no-untyped-def]
    """A fresh engine each time: nothing is found in its caches."""
    engine = Engine(loaded.model, loaded.tokenizer, EngineSettings())
    engine.start()
    run = ask(engine, prompts, params)
    engine.stop()
    return run


def tell(options: Options, loaded: Loaded, theirs: float, ours: float, equal: int, first: float) -> None:
    where = provenance()
    kind = str(loaded.model.dtype).removeprefix("torch.")
    print(f"{where.command}\ncommit {where.commit}, {where.date}, {where.hardware}, {torch.get_num_threads()} threads, {kind}\n")
    print(f"| {options.model}, {options.streams} prompts, {options.tokens} tokens each | tokens/s in all |\n| --- | --- |")
    print(f"| transformers' generate, one by one | {theirs:.1f} |\n| the engine, side by side | {ours:.1f} |")
    print(f"\n{ours / theirs:.2f} times; {equal} of {options.streams} answers equal; first token after {first:.2f} s (median)")
    if options.json:
        numbers = {"transformers_tokens_s": theirs, "engine_tokens_s": ours, "ratio": ours / theirs, "equal_answers": equal}
        told = {"command": "bench/engine.py", "where": asdict(where), "dtype": kind, "streams": options.streams} | numbers
        options.json.write_text(json.dumps(told | {"median_seconds_to_first": first}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options))
