"""How long a run takes and how much memory, before it begins: a few measured passes, and the plan of all of them.

In: a recipe, its data, the plan of its passes.  Out: Forecast, with what to change when it will not fit.
Time: each pass costs a share for its tokens, its squared row lengths and itself, fitted to the measured ones; tiles that are new
go through what is frozen once; then come updates, looks at held-out samples, and saves. Memory: the measured peak of the heaviest
pass, and what a run keeps from then on: built rows, features.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from tessella.errors import MemoryError_, TrainingError
from tessella.inputs import Inputs
from tessella.train.batch import KEPT_BYTES, Steps
from tessella.train.dataset import RecipeData
from tessella.train.features import SHARE_OF_FREE
from tessella.train.held_out import MOST_HELD_OUT, answers_of
from tessella.train.packing import Plan
from tessella.train.recipe import Recipe
from tessella.train.sample import Sample

OUT_OF_MEMORY_CODES = (3, -9, 137)  # the measuring process said so, or was killed for it
SPARE = 0.97  # of the free memory may be planned with


@dataclass(frozen=True)
class Forecast:
    """What a run will take."""

    device: str
    steps: int
    passes: int
    seconds: float  # by the clock, on a machine as busy as now
    cpu_seconds: float  # of all threads; the same on a busy machine
    peak_bytes: int
    room_bytes: int  # what the run may take
    parts: dict[str, float]  # seconds of each part
    advice: tuple[str, ...]  # what to change, the most telling first; empty when it fits

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.room_bytes

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {**asdict(self), "fits": self.fits}

    def told(self) -> str:
        """For people."""
        gib = 2**30
        most = sorted(self.parts.items(), key=lambda part: -part[1])
        lines = [
            f"forecast on {self.device}: {self.steps:,} steps of {self.passes / max(1, self.steps):.1f} passes, "
            f"{duration(self.seconds)}; peak {self.peak_bytes / gib:.2f} GiB of {self.room_bytes / gib:.2f} GiB",
            "  " + ", ".join(f"{name} {duration(seconds)}" for name, seconds in most if seconds >= 0.01 * self.seconds),
        ]
        return "\n".join([*lines, *(f"! it will not fit: {one}" for one in self.advice)])


def duration(seconds: float) -> str:
    """95 -> "1:35 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{int(seconds // 60)}:{int(seconds % 60):02} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02} h"


def epoch_of(recipe: Recipe, data: RecipeData, inputs: Inputs) -> Plan:
    """The passes of a recipe's first epoch."""
    steps = Steps(
        data.train, inputs, looks=len(data.train), samples_per_step=recipe.samples_per_step,
        tokens_per_pass=recipe.tokens_per_pass, seed=recipe.seed, packing=recipe.packing,
    )  # fmt: skip
    return steps.plan(0)


def measured(recipe: Recipe) -> dict[str, Any]:
    """What a process of its own measures: measuring.Measured as JSON. Raises TrainingError, MemoryError_."""
    with tempfile.TemporaryDirectory(prefix="tessella-forecast-") as folder:
        file, out = Path(folder, "recipe.toml"), Path(folder, "measured.json")
        few = replace(recipe, output=Path(folder, "run"), resume=False, trackers=(), max_bad_share=1.0)
        file.write_text(few.to_toml(), encoding="utf-8")
        command = [sys.executable, "-m", "tessella.train.measuring", str(file), str(out)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode in OUT_OF_MEMORY_CODES:
            raise MemoryError_("it will not fit: the measured pass alone ran out of memory. " + " ".join(_generic(recipe)))
        if ended.returncode:
            raise TrainingError(f"the forecast could not be measured: {ended.stderr.strip()[-600:] or ended.returncode}")
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return found


def forecast(recipe: Recipe, data: RecipeData, plan: Plan, inputs: Inputs, found: dict[str, Any]) -> Forecast:
    """From what was measured to the whole run."""
    looks = max(1, round(recipe.epochs * len(data.train)))
    steps = -(-looks // recipe.samples_per_step)
    steps = min(steps, recipe.max_steps or steps)
    seen = min(1.0, steps * recipe.samples_per_step / len(data.train))  # share of the samples that are seen at all
    parts: dict[str, dict[str, float]] = {}
    for kind in ("wall_s", "cpu_s"):
        parts[kind] = _seconds(recipe, data, plan, inputs, found, steps, seen, kind)
    peak = _peak(recipe, data, inputs, found, seen)
    room = int(SPARE * (found["free_bytes"] + found["base_bytes"]))
    passes = sum(len(plan.steps[step % len(plan.steps)]) for step in range(steps))
    advice = _advice(recipe, plan, found, peak - room) if peak > room else ()
    wall, cpu = (sum(parts[kind].values()) for kind in ("wall_s", "cpu_s"))
    return Forecast(found["device"], steps, passes, wall, cpu, peak, room, parts["wall_s"], advice)


def _seconds(
    recipe: Recipe, data: RecipeData, plan: Plan, inputs: Inputs, found: dict[str, Any], steps: int, seen: float, kind: str
) -> dict[str, float]:
    """Seconds of each part of the run."""
    cost = fitted([shape for shape, _ in found["passes"]], [clock[kind] for _, clock in found["passes"]])
    of_step = [sum(cost(_shape(plan, rows)) for rows in step) for step in plan.steps]
    in_workers = found["device"] != "cpu" and recipe.workers > 0 and kind == "wall_s"
    built = seen * len(data.train) if recipe.augment == "none" else steps * recipe.samples_per_step
    held_out = list(data.held_out)[:MOST_HELD_OUT]
    looks = 2 + (steps - 1) // recipe.evaluate_every if recipe.evaluate_every else 1  # before the first step, too
    saves = 1 + ((steps - 1) // recipe.save_every if recipe.save_every else 0)
    shape, clock = found["held_out"]
    of_token = clock[kind] / max(1, shape["tokens"])
    new_tiles = seen * _tiles(data.train, inputs) + _tiles(held_out, inputs) if recipe.caches_features else 0.0
    asked = min(answers_of(recipe), len(held_out))
    return {
        "start": found["start"][kind],
        "passes": sum(of_step[step % len(of_step)] for step in range(steps)),
        "frozen parts": new_tiles * found["tile"][kind],
        "updates": steps * found["update"][kind],
        "reading pictures": 0.0 if in_workers else (built + len(held_out) + asked) * found["build"][kind],
        "held-out": looks * (of_token * sum(sample.tokens for sample in held_out) + asked * found["answer"][kind]),
        "saves": saves * found["save"][kind] + found["result"][kind],
    }


class Cost:
    """Seconds of a pass: no less than 0 for each of tokens, squared lengths and the pass itself."""

    def __init__(self, weights: Sequence[float]):
        self.weights = weights

    def __call__(self, shape: tuple[int, int]) -> float:
        tokens, squares = shape
        return float(np.dot(self.weights, (tokens, squares, 1.0)))


def fitted(shapes: Sequence[dict[str, int]], seconds: Sequence[float]) -> Cost:
    """Least squares with no weight below 0, relative to each pass's own time: the best of all subsets of the three terms."""
    rows = np.array([[shape["tokens"], shape["squares"], 1.0] for shape in shapes])
    wanted = np.maximum(np.array(seconds), 1e-9)
    best, best_miss = np.array([wanted.sum() / rows[:, 0].sum(), 0.0, 0.0]), np.inf
    for count in range(1, min(3, len(rows)) + 1):
        for terms in combinations(range(3), count):
            some = rows[:, terms] / wanted[:, None]
            weights = np.linalg.lstsq(some, np.ones(len(rows)), rcond=None)[0]
            miss = float(((some @ weights - 1) ** 2).sum())
            if (weights >= 0).all() and miss < best_miss - 1e-12:
                best, best_miss = np.zeros(3), miss
                best[list(terms)] = weights
    return Cost(best.tolist())


def _shape(plan: Plan, rows: Sequence[int]) -> tuple[int, int]:
    lengths = [plan.lengths[row] for row in rows]
    return sum(lengths), sum(length * length for length in lengths)


def _tiles(samples: Sequence[Sample], inputs: Inputs) -> int:
    """Tiles of the distinct pictures of samples: what frozen parts are asked once for each."""
    sizes = {(str(p.source), p.max_tiles): size for s in samples for p, size in zip(s.pictures, s.sizes, strict=True)}
    return sum(inputs.tiles_of(*size, most) for (_, most), size in sizes.items())


def _peak(recipe: Recipe, data: RecipeData, inputs: Inputs, found: dict[str, Any], seen: float) -> int:
    """The measured peak and what is kept beside it."""
    peak = max(bytes_ for _, bytes_ in found["peaks"])
    held_out = list(data.held_out)[:MOST_HELD_OUT]
    on_cpu = found["device"] == "cpu"
    if recipe.caches_features:
        tiles = int(seen * _tiles(data.train, inputs)) + _tiles(held_out, inputs)
        peak += min(tiles * found["tile_bytes"], int(SHARE_OF_FREE * found["free_bytes"]))
    if on_cpu:
        if recipe.augment == "none":
            peak += min(KEPT_BYTES, int(seen * len(data.train)) * found["row_bytes"])
        peak += len(held_out) * found["row_bytes"]
    return int(peak)


def _advice(recipe: Recipe, plan: Plan, found: dict[str, Any], excess: int) -> tuple[str, ...]:
    """What to lower, with the number that fits where the measured passes tell it."""
    (few, low), (many, high) = found["peaks"][0], found["peaks"][-1]
    advice = []
    longest = max(plan.lengths)
    if many > few and high > low:
        fitting = int(many - excess / ((high - low) / (many - few)))
        if fitting >= longest:
            advice.append(
                f"--tokens-per-pass {fitting // 64 * 64:,} (now {recipe.tokens_per_pass:,}; it changes no result)".replace(
                    ",", ""
                )
            )
    elif recipe.tokens_per_pass > longest:
        advice.append(f"--tokens-per-pass {longest} (now {recipe.tokens_per_pass}; it changes no result)")
    return tuple(advice + _generic(recipe))


def _generic(recipe: Recipe) -> list[str]:
    """What lowers memory for any run, the cheapest in quality first."""
    advice = []
    if "language" not in recipe.recompute:
        advice.append("--recompute language: layers are computed again in the backward pass (a third more time)")
    if recipe.tower != "frozen":
        advice.append("--tower frozen: the tower keeps nothing for a backward pass")
    if recipe.language == "full":
        advice.append("--language lora: 16 bytes for each parameter that learns are saved")
    advice.append("--max-tiles lower: fewer tokens a picture")
    return advice
