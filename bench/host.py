"""What a step of the engine costs the host: CPU time a row, with a model that computes nothing.

    python bench/host.py --rows 256

On a GPU this work is done while the device computes; the larger of the two is the time of a step. Prints microseconds.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from shapes import Bench
from shapes import Options as Shapes

from tessella.engine.core import Core
from tessella.engine.request import EngineSettings, Piece, Request
from tessella.engine.runner import Outcome
from tessella.engine.scheduler import Batch
from tessella.provenance import provenance
from tessella.sampling import SamplingParams


@dataclass(frozen=True)
class Options:
    rows: int = 256  # answers side by side
    steps: int = 25  # that are measured
    json: Path | None = None


class Idle:
    """Stands in a Runner's place: every row's next id is the letter of a byte."""

    def __init__(self, core: Core, rows: int):
        self.logits = torch.zeros((rows, core.model.config.language.vocab_size))
        self.drawn = torch.ones((2, rows), dtype=torch.int64)

    def run(self, batch: Batch) -> Outcome | None:
        count = len(batch.drawing)
        return Outcome(self.logits[:count], self.drawn[:, :count]) if count else None


@dataclass(frozen=True)
class Cost:
    """Microseconds of this process's CPU time."""

    submit: float  # a request of 71 tokens
    step: float  # a row in a step


def measured(options: Options) -> Cost:
    bench = Bench(Shapes(device="cpu", tiny=True))
    room = options.rows * 256
    how = EngineSettings(block_tokens=64, cache_tokens=room, max_batch_tokens=8192, max_running=options.rows, run_ahead=True)
    core = Core(bench.model, bench.tokenizer, how)
    core.runner.run = Idle(core, options.rows).run  # type: ignore[method-assign]
    came: list[int] = []

    def hear(piece: Piece) -> None:
        came.extend(piece.ids)

    begun = time.process_time()
    params = SamplingParams(max_tokens=options.steps + 8)
    for prompt in bench.text(options.rows):
        core.add(core.make_row(Request(prompt, params, ()), hear))
    submitted = time.process_time()
    while len(came) < options.rows:  # all prompts are over
        core.step()
    first, start = len(came), time.process_time()
    for _ in range(options.steps):
        core.step()
    ended = time.process_time()
    return Cost(1e6 * (submitted - begun) / options.rows, 1e6 * (ended - start) / (len(came) - first))


def main(options: Options) -> None:
    where = provenance()
    cost = measured(options)
    print(f"{where.command}\ncommit {where.commit}, {where.date}, {where.hardware}, {options.rows} rows\n")
    print(f"a request, from submit to its place among the waiting: {cost.submit:.0f} us; a row in a step: {cost.step:.1f} us")
    if options.json:
        told = {"command": "bench/host.py", "where": asdict(where), "rows": options.rows, "microseconds": asdict(cost)}
        options.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options))
