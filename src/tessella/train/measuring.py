"""A few passes of a run, measured in a process of its own, so that its peak memory is that of the run.

In: a recipe (TOML) and the folder that the result goes to.  Out: measured.json: Measured.
Run by forecast.py as `python -m tessella.train.measuring RECIPE OUT`; nothing else imports it.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from pathlib import Path

import psutil
import torch
from rich.console import Console

from tessella.errors import ConfigError, TessellaError, is_out_of_memory
from tessella.inputs import Inputs, ModelInput
from tessella.model.device import free_bytes
from tessella.train.batch import Pack, Steps, pack
from tessella.train.begin import load_to_teach
from tessella.train.held_out import HeldOut, answers_of
from tessella.train.limits import Stop
from tessella.train.log import Log
from tessella.train.lora import prepare
from tessella.train.optimiser import Optimiser
from tessella.train.passes import Passes
from tessella.train.recipe import Recipe, load_recipe
from tessella.train.record import Record
from tessella.train.result import save_result
from tessella.train.samples_seen import write_list
from tessella.train.state import Progress, save
from tessella.train.supply import supply
from tessella.train.trackers import open_trackers
from tessella.train.world import World

HELD_OUT = 4  # samples whose loss is measured
PASSES = 3  # of a run's passes are measured: the lightest, the middle and the heaviest one


@dataclass(frozen=True)
class Shape:
    """What a pass costs hangs on these."""

    tokens: int
    squares: int  # sum over rows of length squared: attention
    tiles: int


@dataclass(frozen=True)
class Clock:
    """Seconds by the wall, and of all this process's threads."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Measured:
    """One object of measured.json. Bytes are of the device that computes: of a CPU this process's largest resident set."""

    device: str
    start: Clock  # imports, weights, data and the look at it, adapters, what a run writes before its first step
    build: Clock  # one sample on average: decoding, cutting, tokens
    passes: tuple[tuple[Shape, Clock], ...]  # forward and backward, what frozen parts say already kept
    tile: Clock  # one new tile through what is frozen
    update: Clock  # the optimiser's step
    held_out: tuple[Shape, Clock]  # forward alone
    answer: Clock  # one of the answers to held-out questions, asked together
    save: Clock  # one checkpoint
    result: Clock  # what was learned, written at the end
    peaks: tuple[tuple[int, int], ...]  # (tokens of the heaviest pass so far, peak bytes)
    row_bytes: int  # of one built row on average, kept for later epochs
    tile_bytes: int  # of what frozen parts say of one tile
    base_bytes: int  # before the first pass
    free_bytes: int  # then


class Bench:
    """The parts of a run, as loop.Run makes them, and its clock."""

    def __init__(self, recipe: Recipe):
        if recipe.method != "sft":
            raise ConfigError(
                f'method is "{recipe.method}": only "sft" is measured ahead; a pair costs about 1.5 of its two rows'
            )
        self.recipe = recipe
        torch.manual_seed(recipe.seed)
        loaded, begun = load_to_teach(recipe)
        loaded.inputs = Inputs(
            loaded.config, loaded.tokenizer, max_tiles=recipe.max_tiles, context_tokens=recipe.context_tokens,
            system=recipe.system, limit_megapixels=recipe.limit_megapixels,
        )  # fmt: skip
        self.loaded, self.device = loaded, loaded.model.device
        self.data = supply(recipe, loaded.inputs)
        self.taught = prepare(loaded.model, recipe, begun)
        self.steps = Steps(
            self.data.train, loaded.inputs, looks=len(self.data.train), samples_per_step=recipe.samples_per_step,
            tokens_per_pass=recipe.tokens_per_pass, seed=recipe.seed, augmentation=recipe.augment, packing=recipe.packing,
        )  # fmt: skip
        self.optimiser = Optimiser(self.taught, recipe, len(self.steps))
        self.passes = Passes(loaded.model, recipe)

    def clock(self, deed: Callable[[], object]) -> Clock:
        """How long a deed takes; on a GPU until it has computed."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        wall, cpu = time.perf_counter(), time.process_time()
        deed()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return Clock(time.perf_counter() - wall, time.process_time() - cpu)

    def peak(self) -> int:
        """The most memory that was taken on the device so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device)
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def chosen(self) -> list[tuple[int, ...]]:
        """The lightest, the middle and the heaviest pass of the first epoch, by tokens."""
        plan = self.steps.plan(0)
        ranked = sorted(set(plan.passes), key=lambda rows: (plan.tokens_of(rows), rows))
        places = sorted({0, len(ranked) // 2, len(ranked) - 1})
        return [ranked[place] for place in places[-PASSES:]]

    def rows(self, numbers: Sequence[int]) -> list[ModelInput]:
        return [self.steps.row(number) for number in numbers]

    def learn(self, one: Pack) -> None:
        """Forward and backward, as a run does them."""
        if len(one.targets):
            (self.passes.loss(one) / len(one.targets)).backward()  # type: ignore[no-untyped-call, unused-ignore]
            self.optimiser.accumulate()


def shape_of(one: Pack) -> Shape:
    return Shape(len(one.ids), sum(length * length for length in one.lengths), len(one.tiles))


def measure(recipe: Recipe) -> Measured:
    """Run a few passes, an update, a look at held-out samples and a save, and read clock and memory behind each."""
    bench = Bench(recipe)
    log = _open(bench)
    # Since the process began: a run reads torch and PEFT from the disk, too.
    start = Clock(time.time() - psutil.Process().create_time(), time.process_time())
    base, free = bench.peak(), free_bytes(bench.device)
    model = bench.loaded.model.train()
    passes, peaks, fresh, built, update = [], [], [], [], Clock(0, 0)
    for rows in bench.chosen():
        built.append((len(rows), bench.clock(partial(bench.rows, rows))))
        one = pack(bench.rows(rows))
        first = bench.clock(partial(bench.learn, one))
        again = bench.clock(partial(bench.learn, one)) if recipe.caches_features else first
        fresh.append((len(one.tiles), first, again))
        passes.append((shape_of(one), again))
        update = bench.clock(lambda: bench.optimiser.step(0))
        peaks.append((len(one.ids), bench.peak()))
    model.eval()
    held, held_clock, answer = _held_out(bench)
    save_clock = bench.clock(lambda: _save(bench))
    result = bench.clock(lambda: save_result(recipe, bench.loaded, bench.taught, bench.optimiser.values()))
    with log:
        pass  # closed
    tiles = sum(count for count, _, _ in fresh)
    rows_built = sum(count for count, _ in built)
    kept = max(1, len(bench.passes.tiles.kept))
    return Measured(
        str(bench.device), start, _mean([clock for _, clock in built], rows_built), tuple(passes),
        _mean([Clock(max(0.0, a.wall_s - b.wall_s), max(0.0, a.cpu_s - b.cpu_s)) for _, a, b in fresh], tiles), update,
        (held, held_clock), answer, save_clock, result, (*peaks, (peaks[-1][0], bench.peak())),
        bench.steps.kept_bytes // max(1, len(bench.steps.kept)), bench.passes.tiles.num_bytes // kept, base, free,
    )  # fmt: skip


def _held_out(bench: Bench) -> tuple[Shape, Clock, Clock]:
    """Loss of a few held-out samples, and one answer; zeros where nothing is held out."""
    few = replace(bench.recipe, sample_answers=min(HELD_OUT, answers_of(bench.recipe)))
    looker = HeldOut(list(bench.data.held_out)[:HELD_OUT], bench.loaded, bench.passes, few)
    if not looker.samples:
        return Shape(0, 0, 0), Clock(0, 0), Clock(0, 0)
    stop = Stop(None, 0.0)
    looker.loss(stop)  # tiles go through the tower once
    clock = bench.clock(lambda: looker.loss(stop))
    shapes = [shape_of(one) for one in looker.packs or ()]
    whole = Shape(*(sum(column) for column in zip(*(astuple(shape) for shape in shapes), strict=True)))
    asked = min(few.sample_answers, len(looker.samples))
    return whole, clock, _mean([bench.clock(looker.answers)], asked)


def _open(bench: Bench) -> Log:
    """What a run writes before its first step; TensorBoard and what it needs are read from the disk, too."""
    recipe, data = bench.recipe, bench.data
    Record(recipe, World()).start(bench.loaded, bench.taught, data.train, data.held_out, data.ledger, len(bench.steps))
    write_list(recipe.output, data.train)
    quiet = Console(quiet=True)
    return Log(
        recipe.output, total_steps=len(bench.steps), first_step=0, device=bench.device, console=quiet,
        trackers=lambda first_step: open_trackers(recipe, first_step),
    )  # fmt: skip


def _save(bench: Bench) -> None:
    """A checkpoint, as a run writes it: hashed, and waited for until it lies on the disk."""
    total = len(bench.steps)
    save(bench.recipe.output, Progress(total, total, bench.recipe.settled(), "", 0.0), bench.optimiser.state(), keep=1)


def _mean(clocks: list[Clock], count: int) -> Clock:
    return Clock(sum(c.wall_s for c in clocks) / max(1, count), sum(c.cpu_s for c in clocks) / max(1, count))


def main(recipe_file: Path, out: Path) -> int:
    """Exit code 0 and measured.json, or 2 and the reason on stderr."""
    try:
        recipe = load_recipe(recipe_file)
        out.write_text(json.dumps(asdict(measure(recipe))), encoding="utf-8")
    except (TessellaError, MemoryError, RuntimeError) as error:
        if not isinstance(error, TessellaError) and not is_out_of_memory(error):
            raise
        print(f"{'out of memory: ' if is_out_of_memory(error) else ''}{error}", file=sys.stderr)
        return 3 if is_out_of_memory(error) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
