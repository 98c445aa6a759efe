"""Write the training data of the built-in model: LLaVA-style JSONL and pictures, drawn by many processes.

In: --parts (collect.py), --data (the folder of the picture tars).
Out: --out/{stage}.jsonl with pictures beside it; stage "skills" writes --out/skills/{skill}.jsonl, data held out from
training, each row with "answers": all that counts as right. The same seed gives the same files, whatever --workers is.
Rows: {"id", "kind", "image" (not for chat), "conversations": [{"from": "human" | "gpt", "value"}], "answers"}.
"""

import argparse
import json
import multiprocessing
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from drawing import Parts, photos_of
from samples import KINDS, SKILLS, Sample, held_out_photo

CHUNK = 256  # samples a process makes at a time; also the pictures of one folder
SKILL_SAMPLES = 1000
STYLES = ("fluent3d", "flat", "noto", "openmoji")  # twemoji is kept unseen


@dataclass(frozen=True)
class Job:
    """One run of sample numbers of one stage or skill."""

    parts: Parts
    out: Path
    stage: str
    seed: int
    numbers: range


def row_of(job: Job, number: int, kind: str, sample: Sample) -> dict:
    """Write the picture and give the row that names it."""
    row: dict = {"id": f"{job.stage}-{number}", "kind": kind}
    if sample.picture is not None:
        name = f"pictures/{job.stage}/{number // CHUNK:05d}/{number:07d}.{sample.ending}"
        (job.out / name).write_bytes(sample.picture)
        row["image"] = name
    turns = []
    for i, (question, answer) in enumerate(sample.turns):
        mark = "<image>\n" if i == 0 and sample.picture is not None else ""
        turns += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    row["conversations"] = turns
    row["answers"] = list(sample.answers)
    return row


def make(job: Job) -> str:
    """The JSON lines of a job; each sample's chance comes from its own number, so no order of work shows."""
    (job.out / "pictures" / job.stage / f"{job.numbers.start // CHUNK:05d}").mkdir(parents=True, exist_ok=True)
    lines = []
    held_out = photos_of(job.parts.data / "tiny-imagenet-val.tar") if job.stage == "naming" else []
    for number in job.numbers:
        rng = random.Random(f"{job.seed}/{job.stage}/{number}")
        if job.stage == "naming":
            kind, sample = "photo", held_out_photo(held_out[number], job.parts.wordnet)
        elif job.stage in SKILLS:
            kind, sample = job.stage, SKILLS[job.stage](rng, job.parts, True)
        else:
            shares = [getattr(k, job.stage) for k in KINDS.values()]
            kind = rng.choices(list(KINDS), shares)[0]
            sample = KINDS[kind].make(rng, job.parts, False)
        lines.append(json.dumps(row_of(job, number, kind, sample), ensure_ascii=False) + "\n")
    return "".join(lines)


def write(parts: Parts, out: Path, name: str, stage: str, samples: int, seed: int, workers: int) -> None:
    """One JSONL file: made aside by all workers, then moved into place."""
    out.mkdir(parents=True, exist_ok=True)
    jobs = [Job(parts, out, stage, seed, range(s, min(s + CHUNK, samples))) for s in range(0, samples, CHUNK)]
    started = time.perf_counter()
    aside = out / f"{name}.jsonl.part"
    with multiprocessing.get_context("fork").Pool(workers) as pool, aside.open("w", encoding="utf-8") as file:
        for i, lines in enumerate(pool.imap(make, jobs)):
            file.write(lines)
            if i % 40 == 39:
                rate = (i + 1) * CHUNK / (time.perf_counter() - started)
                print(f"{name}: {(i + 1) * CHUNK} / {samples}, {rate:.0f} samples/s", flush=True)
    aside.replace(out / f"{name}.jsonl")
    seconds = time.perf_counter() - started
    print(f"{name}: {samples} samples in {seconds:.1f} s, {samples / seconds:.0f} samples/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", type=Path, required=True, help="folder written by collect.py")
    parser.add_argument("--data", type=Path, required=True, help="folder of the picture tars")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", choices=["align", "instruct", "again", "skills"], required=True)
    parser.add_argument(
        "--samples", type=int, default=100_000, help="samples of align, instruct or again; skills have their own numbers"
    )
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--styles", nargs="+", default=list(STYLES), help="emoji styles to draw with")
    args = parser.parse_args()
    if not (args.parts / "READY").exists():
        sys.exit(f"{args.parts} holds no READY: run collect.py first")
    parts = Parts(args.parts, args.data, tuple(args.styles))
    for needed in (
        parts.names,
        parts.words,
        parts.fonts,
        parts.held_out_fonts,
        parts.tiny,
        parts.one_each,
        parts.dishes,
        parts.wordnet,
    ):
        assert needed, "a part is empty: collect.py did not finish"  # read here once; the processes inherit it
    if args.stage == "skills":
        held_out = len(photos_of(args.data / "tiny-imagenet-val.tar"))
        write(parts, args.out / "skills", "naming", "naming", held_out, args.seed, args.workers)
        for skill in SKILLS:
            write(parts, args.out / "skills", skill, skill, SKILL_SAMPLES, args.seed, args.workers)
    else:
        write(parts, args.out, args.stage, args.stage, args.samples, args.seed, args.workers)


if __name__ == "__main__":
    main()
