"""How exact a forecast is: the same recipe forecast and then run, each in a process of its own.

    python bench/forecast.py                                    the built-in model on this machine's CPU, every case
    python bench/forecast.py lora-short                         one case
    python bench/forecast.py --model ./InternVL2-2B --tiles 1 7 13     a GPU: LoRA, QLoRA and full at these tiles

Time is CPU time of all threads on a CPU, so that other work on the machine does not matter, and the clock's on a GPU.
Memory is the largest resident set of the run's process on a CPU, and the most that torch reserved on a GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tessella.inspection import eyes
from tessella.train.dataset import read_recipe_data
from tessella.train.forecast import epoch_of, forecast, measured
from tessella.train.recipe import Recipe

# Fields of the recipe, pictures, tiles of each, words of a question.
CPU_CASES: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "lora-short": ({"max_steps": 6}, 16, 1, 8),
    "lora-long": ({"max_steps": 4, "tokens_per_pass": 1024}, 12, 4, 60),
    "projector": ({"language": "frozen", "max_steps": 4}, 12, 1, 8),
    "full": ({"language": "full", "max_steps": 3}, 12, 1, 8),
}
GPU_WAYS: dict[str, dict[str, Any]] = {
    "lora": {"lora_rank": 128, "lora_alpha": 256.0},
    "qlora": {"lora_rank": 128, "lora_alpha": 256.0, "quantise": ("language",)},
    "full": {"language": "full", "learning_rate": 2e-5},
}
RUN = """
import json, sys, torch
from pathlib import Path
from tessella.exam import exam_of
from tessella.train.loop import train
from tessella.train.recipe import load_recipe
recipe = load_recipe(Path(sys.argv[1]))
train(recipe, exam=exam_of(recipe))  # as tessella finetune does, but for the page at the end
Path(sys.argv[2]).write_text(json.dumps(torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0))
"""


def make_data(folder: Path, pictures: int, tiles: int, words: int, side_px: int) -> Path:
    """Pictures that are cut into so many tiles, each with a question of its own."""
    rows = []
    for number in range(pictures):
        wide = max(1, tiles - 1)  # the thumbnail is a tile
        Image.effect_noise((side_px * wide, side_px), 60).convert("RGB").save(folder / f"{number}.jpg")
        question = f"What is in picture {number}? " + "Tell me more of it. " * (words // 5)
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "A red apple on a white plate. " * 4}]
        rows.append(json.dumps({"image": f"{number}.jpg", "conversations": turns}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def compare(name: str, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Forecast, run, and how far the one was off."""
    inputs, _ = eyes(recipe.model, recipe.max_tiles)
    data = read_recipe_data(recipe, inputs)
    will = forecast(recipe, data, epoch_of(recipe, data, inputs), inputs, measured(recipe))
    file, out = folder / "recipe.toml", folder / "peak.json"
    file.write_text(recipe.to_toml(), encoding="utf-8")
    began = time.perf_counter()
    with (folder / "run.log").open("w") as log:
        run = subprocess.Popen([sys.executable, "-c", RUN, str(file), str(out)], stdout=log, stderr=log)
        _, status, used = os.wait4(run.pid, 0)
    if status:
        sys.exit(f"{name}: the run failed: {(folder / 'run.log').read_text()[-600:]}")
    on_gpu = torch.cuda.is_available()
    seconds = time.perf_counter() - began if on_gpu else used.ru_utime + used.ru_stime
    peak = json.loads(out.read_text()) if on_gpu else 1024 * used.ru_maxrss
    told = will.seconds if on_gpu else will.cpu_seconds
    return {
        "case": name,
        "seconds_forecast": round(told, 1),
        "seconds": round(seconds, 1),
        "time_off": round(told / seconds - 1, 4),
        "gib_forecast": round(will.peak_bytes / 2**30, 3),
        "gib": round(peak / 2**30, 3),
        "memory_off": round(will.peak_bytes / peak - 1, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "cases", nargs="*", help=f"of {', '.join(CPU_CASES)} on a CPU, of {', '.join(GPU_WAYS)} on a GPU; default all"
    )
    parser.add_argument("--model", default="tessella-nano")
    parser.add_argument("--tiles", type=int, nargs="+", default=[1, 7, 13], help="on a GPU")
    words = parser.parse_args()
    if torch.cuda.is_available():
        cases = {
            f"{way}-{tiles}": ({**fields, "max_steps": 30, "samples_per_step": 16, "tokens_per_pass": 16384}, 64, tiles, 80)
            for way, fields in GPU_WAYS.items()
            for tiles in words.tiles
            if not words.cases or way in words.cases
        }
    else:
        cases = {name: case for name, case in CPU_CASES.items() if not words.cases or name in words.cases}
    for name, (fields, pictures, tiles, length) in cases.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            _, config = eyes(words.model, None)
            data = make_data(folder, pictures, tiles, length, config.tile_size_px)
            usual = {"samples_per_step": 2, "held_out": 2, "sample_answers": 1, "dtype": "float32", "epochs": 20.0}
            usual |= {"dtype": "bfloat16"} if torch.cuda.is_available() else {}
            recipe = Recipe(model=words.model, data=(data,), output=folder / "run", **{**usual, **fields})
            print(json.dumps(compare(name, recipe, folder)), flush=True)


if __name__ == "__main__":
    main()
