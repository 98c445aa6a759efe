"""The same run on one process and on several: loss by step, samples a second, memory of each.

    python bench/scale.py MODEL --ways ddp zero2 zero3 fsdp2 --nproc 2        two GPUs; MODEL: bench/folder.py's, say
    python bench/scale.py SMALL --ways ddp --tiles 1 --steps 8 --report-every 2    a trial on a CPU; SMALL: bench/folder.py --tiny

Every way is `tessella finetune` with the same recipe, data, order and samples a step, in a process of its own. Speed is that of
the steps after the first report; loss is compared at every report.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import tyro
from forecast import make_data

from tessella.provenance import provenance


@dataclass(frozen=True)
class Options:
    model: Annotated[str, tyro.conf.Positional]
    ways: tuple[str, ...] = ("ddp", "zero2", "zero3", "fsdp2")
    language: str = "lora"  # or "full"
    nproc: int = 2
    tiles: int = 7
    samples_per_step: int = 16
    steps: int = 24
    report_every: int = 4
    limit_s: int = 120  # of one run
    json: Path | None = None


@dataclass
class Run:
    way: str
    samples_s: float = 0.0
    memory_gib: float = 0.0  # the most that the first rank held
    losses: list[float] = field(default_factory=list)
    failed: str = ""


def run(way: str, options: Options, data: Path, folder: Path) -> Run:
    out = folder / (way or "one")
    words = [sys.executable, "-m", "tessella.cli", "finetune", "--model", options.model, "--data", str(data)]
    words += ["--output", str(out), "--language", options.language, "--tower", "frozen", "--projector", "frozen"]
    words += ["--lora-rank", "128", "--lora-alpha", "256", "--lora-dropout", "0", "--learning-rate", "1e-4"]
    words += ["--samples-per-step", str(options.samples_per_step), "--max-steps", str(options.steps), "--epochs", "100"]
    words += ["--report-every", str(options.report_every), "--held-out", "0", "--sample-answers", "0", "--no-cache-features"]
    words += ["--tokens-per-pass", "16384"]
    words += ["--nproc", str(options.nproc), "--parallel", way] if way else []
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=options.limit_s)
    except subprocess.TimeoutExpired:
        return Run(way or "one process", failed=f"not done after {options.limit_s} s")
    if done.returncode:
        return Run(way or "one process", failed=(done.stderr + done.stdout)[-800:])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps: list[dict[str, Any]] = [row for row in rows if row["kind"] == "step"]
    apart = [(later["step"] - row["step"]) / (later["seconds"] - row["seconds"]) for row, later in pairwise(steps)]
    speed = statistics.median(apart) * options.samples_per_step
    memory = max(row.get("memory_gib", 0.0) for row in steps)
    return Run(way or "one process", round(speed, 2), round(memory, 2), [round(row["loss"], 4) for row in steps])


def main(options: Options) -> None:
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = make_data(folder, 4 * options.samples_per_step, options.tiles, 20, 448)
        for way in ("", *options.ways):
            runs.append(run(way, options, data, folder))
            print(json.dumps(asdict(runs[-1])), flush=True)
    where = provenance()
    one = runs[0]
    print(f"\n{where.command}\ncommit {where.commit}, {where.date}, {where.hardware}\n")
    print(f"| {options.language}, {options.nproc} processes | samples/s | times one | GiB | largest difference of the loss |")
    print("| --- | --- | --- | --- | --- |")
    for got in runs:
        apart = max((abs(a - b) for a, b in zip(got.losses, one.losses, strict=False)), default=float("nan"))
        times = got.samples_s / one.samples_s if one.samples_s else float("nan")
        print(f"| {got.way} | {got.samples_s} | {times:.2f} | {got.memory_gib} | {got.failed[:60] or f'{apart:.4f}'} |")
    if options.json:
        told = {"where": asdict(where), "runs": [asdict(got) for got in runs]}
        options.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options))
