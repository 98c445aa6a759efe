"""The engine's speed beside transformers' own generate called one by one: same weights, same prompts, same run.

    python bench/engine.py --model tessella-nano --streams 8

Half of the prompts have a picture of one tile. Prints a table; --json PATH writes the numbers. Tokens a second of this
process's own CPU time say something on a busy machine, too, with --threads 1. bench/shapes.py measures the shapes of
InternVL2-2B on a GPU.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from peer import native_model, one_by_one
from work import Run, ask, picture_questions, questions

from tessella.checkpoint.read import Loaded, load
from tessella.engine.engine import Engine
from tessella.image import Size
from tessella.inputs import ModelInput
from tessella.provenance import provenance
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


@dataclass(frozen=True)
class Speeds:
    """Tokens a second of all streams together, by the clock and by the process's CPU time."""

    wall: float
    cpu: float


def main(options: Options) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    loaded = load(options.model, device=options.device, dtype=options.dtype)
    prompts = mixed(loaded, options.streams)
    peer = native_model(loaded)
    one_by_one(peer, prompts[:1], 4)
    theirs: list[Speeds] = []
    ours: list[Speeds] = []
    total = options.streams * options.tokens
    for _ in range(options.rounds):
        ids, seconds, cpu = one_by_one(peer, prompts, options.tokens)
        theirs.append(Speeds(total / seconds, total / cpu))
        run = measured(loaded, prompts, SamplingParams(max_tokens=options.tokens))
        ours.append(Speeds(total / run.seconds, total / run.cpu_seconds))
    equal = sum(a == b.ids for a, b in zip(ids, run.answers, strict=True))
    tell(options, loaded, best(theirs), best(ours), equal, statistics.median(run.seconds_to_first))


def mixed(loaded: Loaded, count: int) -> list[ModelInput]:
    """Text, and then as many pictures of one tile."""
    side = loaded.config.tile_size_px
    shown = picture_questions(loaded.inputs, count // 2, Size(side, side), 1)
    return questions(loaded.inputs, count - count // 2) + shown


def measured(loaded: Loaded, prompts: Sequence[ModelInput], params: SamplingParams) -> Run:
    """In a fresh engine: nothing is found in its caches."""
    engine = Engine(loaded.model, loaded.tokenizer)
    engine.start()
    run = ask(engine, prompts, params)
    engine.stop()
    return run


def best(speeds: Sequence[Speeds]) -> Speeds:
    return Speeds(max(one.wall for one in speeds), max(one.cpu for one in speeds))


def tell(options: Options, loaded: Loaded, theirs: Speeds, ours: Speeds, equal: int, first: float) -> None:
    where = provenance()
    kind = str(loaded.model.dtype).removeprefix("torch.")
    print(f"{where.command}\ncommit {where.commit}, {where.date}, {where.hardware}, {torch.get_num_threads()} threads, {kind}\n")
    print(f"| {options.model}, {options.streams} prompts, {options.tokens} tokens each | tokens/s | tokens/s of CPU time |")
    print("| --- | --- | --- |")
    for who, speeds in {"transformers' generate, one by one": theirs, "the engine, side by side": ours}.items():
        print(f"| {who} | {speeds.wall:.1f} | {speeds.cpu:.1f} |")
    print(f"\n{ours.wall / theirs.wall:.2f} times by the clock, {ours.cpu / theirs.cpu:.2f} times by CPU time")
    print(f"{equal} of {options.streams} answers equal; first token after {first:.2f} s (median)")
    if options.json:
        told = {"command": "bench/engine.py", "where": asdict(where), "dtype": kind, "streams": options.streams}
        numbers = {"transformers_tokens_s": asdict(theirs), "engine_tokens_s": asdict(ours), "equal_answers": equal}
        options.json.write_text(
            json.dumps(told | numbers | {"median_seconds_to_first": first}, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main(tyro.cli(Options))
