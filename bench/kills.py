"""kill -9 at random moments of a tiny run, saving included: is a checkpoint ever broken, and is the end the same to the bit?

In: how often, and a seed.  Out: JSON: kills, those while a checkpoint was being written, broken checkpoints, and whether losses
and weights equal those of a run that nobody killed.  Each attempt is forked from one process that has loaded torch, so that a
kill costs the run and not the start of Python.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from colours import colour_samples, recipe_of
from tessella.train import state
from tessella.train.loop import train
from tessella.train.recipe import Recipe
from tiny import tiny_folder


def attempt(recipe: Recipe) -> int:
    """A forked process that goes on with the run; gives its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        train(recipe, samples=colour_samples())
        code = 0
    finally:
        os._exit(code)


def losses(output: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def same_bits(one: Path, other: Path) -> bool:
    ours, theirs = (load_file(output / "adapter/adapter_model.safetensors") for output in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def kill_one(recipe: Recipe, wait_s: float) -> tuple[bool, bool]:
    """(killed before its end, killed while a checkpoint was being written)."""
    pid = attempt(recipe)
    time.sleep(wait_s)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status), bool(list((recipe.output / state.FOLDER).glob(".*.part")))


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--times", type=int, default=100, help="how many kills; a run that ends before is begun anew")
    words.add_argument("--steps", type=int, default=40, help="steps of the run, each of which is saved")
    words.add_argument("--seed", type=int, default=0, help="of the moments")
    words.add_argument("--json", type=Path, help="write the result there too")
    wish = words.parse_args()
    torch.set_num_threads(1)  # a forked process has one thread, and a sum's last bits depend on their number
    chance, home = random.Random(wish.seed), Path(tempfile.mkdtemp(prefix="kills-"))
    folder = tiny_folder(home / "tiny", "LlamaForCausalLM")
    recipe = recipe_of(
        folder, home / "whole", epochs=float(wish.steps) / 3, save_every=1, report_every=7, lora_dropout=0.2, keep_best=False
    )  # fmt: skip
    begun = time.monotonic()
    train(recipe, samples=colour_samples())
    step_s = (time.monotonic() - begun) / wish.steps
    kills = while_saving = broken = runs = 0
    differing: list[int] = []
    while kills < wish.times:
        runs += 1
        killed = replace(recipe, output=home / f"run-{runs}", resume=True)
        done = False
        while not done and kills < wish.times:
            # Long enough to load the model, and then a few steps on: most kills fall into steps and saving, some before.
            was_killed, saving = kill_one(killed, chance.uniform(2, 14) * step_s)
            done, kills, while_saving = not was_killed, kills + was_killed, while_saving + (was_killed and saving)
            broken += sum(state.damage(one) is not None for one in state.saved(killed.output))
            print(f"{kills} of {wish.times} kills, {while_saving} while saving, {broken} broken", file=sys.stderr, flush=True)
        train(killed, samples=colour_samples())
        if not same_bits(killed.output, recipe.output) or losses(killed.output) != losses(recipe.output):
            differing.append(runs)
    result = {
        "kills": kills, "while a checkpoint was written": while_saving, "broken checkpoints": broken, "runs": runs,
        "runs that differ in a bit of loss or weights": differing,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if wish.json:
        wish.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
