"""Why the MLP: six connectors between the same frozen tower and the same frozen language model, same pictures, same order.

In: the Tiny-ImageNet folder.  Out: a JSON line for each measuring of each connector and seed; plot.py draws them.
Each learns to name what is in a picture. Measured on pictures held out: the mean loss of a name's tokens, and the share of
names that would be answered exactly (each token the likeliest, the end too). Beside it: parameters, visual tokens of a tile,
seconds, and the time to the first token of an answer.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pictures
import torch
import torch.nn.functional as F
from connectors import STAGED, VARIANTS, count, match_spread, model_with, slots
from pictures import Shown
from stage1 import take_over, teach
from torch import Tensor

from tessella.chat import Message
from tessella.checkpoint.read import Loaded
from tessella.generate import generate
from tessella.image import TileRule, Tiles, cut_tiles
from tessella.inputs import ModelInput, Picture
from tessella.sampling import SamplingParams
from tessella.train.batch import Pack, order_of, pack
from tessella.train.features import Kept, chosen
from tessella.train.optimiser import Optimiser
from tessella.train.passes import Passes
from tessella.train.recipe import Recipe
from tessella.train.taught import Taught

RATES = {"q-former": 5e-4, STAGED: 5e-4}  # the others learn at OTHERS; --rate tries another for all
OTHERS = 1e-3
WARMUP, TRIES = 0.05, 5


@dataclass(frozen=True)
class Plan:
    """How much is learned. A smaller tile has fewer patches, and so each connector fewer tokens."""

    classes: int = 200
    per_class: int = 120
    held_out: int = 1000
    steps: int = 800
    batch: int = 64
    stage1_steps: int = 800
    measurings: int = 10
    tile_px: int = 224


SMALL = Plan(classes=10, per_class=40, held_out=60, steps=40, batch=8, stage1_steps=60, measurings=4, tile_px=112)


@dataclass
class Place:
    """Where all runs run, and what they share."""

    device: str
    rate: float | None  # of every connector; None for each one's own
    cut: dict[int, Tiles]  # of each picture, by its identity: all connectors see the same tiles
    kept: Kept | None = None  # the frozen tower's features, by tile


class Run:
    """One connector with one seed."""

    def __init__(self, name: str, seed: int, plan: Plan, train: Sequence[Shown], held_out: Sequence[Shown], place: Place):
        self.name, self.seed, self.plan = name, seed, plan
        self.loaded = model_with(name, place.device, seed, plan.tile_px)
        self.train, self.held_out = self._rows(train, place.cut), self._rows(held_out, place.cut)
        self.rate = place.rate or RATES.get(name, OTHERS)
        self.recipe = Recipe(
            language="frozen", tower="frozen", projector="train", learning_rate=self.rate, warmup_share=WARMUP, weight_decay=0.01
        )
        self.passes = Passes(self.loaded.model, self.recipe)
        self.passes.tiles = place.kept or self.passes.tiles
        place.kept = self.passes.tiles
        self.stage1: dict[str, Any] = {}
        if name == STAGED:
            self._first_stage(train)
        match_spread(self.loaded, torch.cat([row.tiles for row in self.train[:16]]).to(self.loaded.model.device))
        self.loaded.model.mlp1.requires_grad_(True)

    def _rows(self, shown: Sequence[Shown], cut: dict[int, Tiles]) -> list[ModelInput]:
        """Rows of one name differ in nothing but their tile."""
        of_name: dict[str, ModelInput] = {}
        for one in shown:
            if one.name not in of_name:
                messages, picture = one.sample
                of_name[one.name] = self.loaded.inputs.build(messages, [picture], open_turn=False)
        return [replace(of_name[one.name], tiles=cut[id(one)].pixels, digests=cut[id(one)].digests) for one in shown]

    def _features(self, rows: Sequence[ModelInput]) -> Tensor:
        """The tower's features (N, P, P, C) of rows of one tile each."""
        tiles, model = torch.cat([row.tiles for row in rows]), self.loaded.model
        digests = [digest for row in rows for digest in row.digests]
        return torch.stack(self.passes.tiles(digests, lambda places: model.features(chosen(tiles, places).to(model.device))))

    def _first_stage(self, train: Sequence[Shown]) -> None:
        start, plan = time.perf_counter(), self.plan
        names, features = [one.name for one in train], self._features(self.train)
        taught, told = teach(features, names, self.loaded.tokenizer, steps=plan.stage1_steps, batch=plan.batch, seed=self.seed)
        take_over(self.loaded.model.mlp1[0], taught)
        self.stage1 = {**told, "seconds": round(time.perf_counter() - start, 1)}

    def learn(self, out: Path) -> None:
        """Learn and write a line at each measuring. Measuring is not counted among the seconds."""
        plan, connector = self.plan, self.loaded.model.mlp1
        learning = {f"mlp1.{name}": parameter for name, parameter in connector.named_parameters()}
        optimiser = Optimiser(Taught(learning, ("mlp1",), False), self.recipe, plan.steps)
        epochs = range(-(-plan.steps * plan.batch // len(self.train)))
        looks = [place for epoch in epochs for place in order_of(len(self.train), self.seed, epoch)]
        seconds, recent = 0.0, []
        for step in range(plan.steps):
            start = time.perf_counter()
            one = pack([self.train[place] for place in looks[step * plan.batch : (step + 1) * plan.batch]])
            loss = self.passes.loss(one) / len(one.targets)
            loss.backward()
            optimiser.accumulate()
            optimiser.step(step)
            recent.append(loss.item())  # waits for the device, so that the clock is honest
            seconds += time.perf_counter() - start
            if (step + 1) % max(1, plan.steps // plan.measurings) == 0 or step + 1 == plan.steps:
                self._tell(out, step + 1, seconds, sum(recent) / len(recent))
                recent.clear()

    def _tell(self, out: Path, step: int, seconds: float, loss: float) -> None:
        model, plan = self.loaded.model, self.plan
        held_loss, accuracy = measure(self.passes, self.held_out, plan.batch)
        line = {
            "connector": self.name, "seed": self.seed, "step": step, "samples": step * plan.batch, "seconds": round(seconds, 2),
            "train_loss": round(loss, 4), "held_out_loss": round(held_loss, 4), "held_out_accuracy": round(accuracy, 4),
            "parameters": count(model.mlp1), "visual_tokens": slots(model.config), "rate": self.rate, "stage1": self.stage1,
        }  # fmt: skip
        if step == plan.steps:
            line["first_token_ms"] = round(first_token_ms(self.loaded, self.held_out[0]), 1)
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{self.name}, seed {self.seed}: step {step}, held-out loss {held_loss:.3f}, accuracy {accuracy:.1%}", flush=True)


@torch.no_grad()
def measure(passes: Passes, rows: Sequence[ModelInput], batch: int) -> tuple[float, float]:
    """Mean loss of the learned tokens, and the share of rows whose every learned token is the likeliest."""
    total, learned, exact = 0.0, 0, 0
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        one = pack(some).to(passes.model.device)
        logits = logits_at(passes, one)
        total += float(F.cross_entropy(logits, one.targets, reduction="sum"))
        learned += len(one.targets)
        right = (logits.argmax(-1) == one.targets).split([int(row.learn.sum()) for row in some])
        exact += sum(int(part.all()) for part in right)
    return total / learned, exact / len(rows)


def logits_at(passes: Passes, one: Pack) -> Tensor:
    """The logits (L, V) at the positions that learn."""
    hidden = passes.model.language_model(passes.embed(one), one.positions, passes.attend(one), max(one.lengths))
    return passes.model.logits(hidden.index_select(0, one.predict)).float()


def first_token_ms(loaded: Loaded, row: ModelInput) -> float:
    """From a prompt with one picture to the first token: tower, connector and prefill; the best of some tries."""
    picture = Picture(pictures.Image.fromarray(row.tiles[0].permute(1, 2, 0).numpy()), max_tiles=1)
    prompt = loaded.inputs.build([Message("user", pictures.QUESTION)], [picture])
    times = []
    for _ in range(TRIES):
        start = time.perf_counter()
        next(generate(loaded.model, prompt, SamplingParams(max_tokens=1), ()))
        times.append(1000 * (time.perf_counter() - start))
    return min(times)


def cut_all(shown: Sequence[Shown], side_px: int) -> dict[int, Tiles]:
    """Each picture as one tile; Pillow and the hashes leave Python's lock, so threads help."""
    rule = TileRule(side_px, max_tiles=1)
    with ThreadPoolExecutor() as pool:
        return dict(zip(map(id, shown), pool.map(lambda one: cut_tiles(one.picture, rule), shown), strict=True))


def side_by_side(out: Path, seeds: Sequence[int]) -> None:
    """This program once for each seed, all at the same time; then their lines in one file. Stops when one of them fails."""
    own = {seed: out.with_name(f"{out.stem}-{seed}{out.suffix}") for seed in seeds}
    given = sys.argv[1:]
    runs = {
        seed: subprocess.Popen([sys.executable, __file__, *given, "--seeds", str(seed), "--out", str(file), "--one-by-one"])
        for seed, file in own.items()
    }
    if failed := [seed for seed, run in runs.items() if run.wait()]:
        raise SystemExit(
            f"seed {failed[0]} failed; what it said stands above, and the same command goes on from what was measured"
        )
    by_seed = [own[seed].read_text(encoding="utf-8").splitlines() for seed in seeds]
    lines = [line for of_seed in by_seed for line in of_seed]
    lines.sort(key=lambda line: list(VARIANTS).index(json.loads(line)["connector"]))
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the Tiny-ImageNet tars")
    parser.add_argument("--out", type=Path, default=Path("why_mlp.jsonl"), help="lines are added; what is there is not run again")
    parser.add_argument("--small", action="store_true", help="for a CPU: 10 classes, 40 steps, tiles of 112 px")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--one-by-one", action="store_true", help="not, as on a GPU, each seed in a process beside the others")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rate", type=float, default=None, help="peak learning rate of every connector")
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=list(VARIANTS), metavar="CONNECTOR")
    args = parser.parse_args()
    if not (args.data / "tiny-imagenet-classes.json").is_file():
        parser.error(f"--data {args.data} holds no tiny-imagenet-classes.json; give the folder with the Tiny-ImageNet tars")
    plan = SMALL if args.small else Plan()
    if torch.cuda.is_available() and len(args.seeds) > 1 and not args.one_by_one:
        side_by_side(args.out, args.seeds)
        return
    train, held_out = pictures.load(args.data, plan.classes, plan.per_class, plan.held_out)
    lines = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.is_file() else []
    done = {(line["connector"], line["seed"]) for line in lines if line["step"] == plan.steps}
    place = Place(args.device, args.rate, cut_all([*train, *held_out], plan.tile_px))
    for seed in args.seeds:
        for name in args.only:
            if (name, seed) not in done:
                Run(name, seed, plan, train, held_out, place).learn(args.out)


if __name__ == "__main__":
    main()
