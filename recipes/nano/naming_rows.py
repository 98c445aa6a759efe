"""Rows that keep the built-in model's naming while it learns something else: photographs of Tiny-ImageNet and some talk.

In: --data, the folder of the picture tars (no parts, as make_data.py needs them).  Out: --out/rows.jsonl to learn from,
--out/naming.jsonl to measure on (the validation pictures, as make_data.py --stage skills writes them), pictures beside them.
The same seed gives the same files, whatever --workers is.
"""

import argparse
import json
import multiprocessing
import random
from pathlib import Path

from drawing import Photo, photos_of, read_json
from samples import ASK, Sample, changed, chat, held_out_photo, pick, synonyms

CHUNK = 256  # rows a process makes at a time; also the pictures of one folder
TALK = 0.08  # share of rows without a picture


def taught(rng: random.Random, photos: list[Photo], wordnet: dict[str, str]) -> Sample:
    if rng.random() < TALK:
        return chat(rng, None, False)
    found = rng.choice(photos)
    names = synonyms(wordnet[found.label])
    picture, ending = changed(rng, found)
    return Sample(picture, ending, ((pick(rng, ASK["photo"], False), names[0]),), names)


def row_of(out: Path, name: str, number: int, sample: Sample) -> str:
    """Write the picture and give the line that names it."""
    row: dict = {"id": f"{name}-{number}"}
    mark = ""
    if sample.picture is not None:
        row["image"] = f"pictures/{name}/{number // CHUNK:05d}/{number:07d}.{sample.ending}"
        mark = "<image>\n"
        (out / row["image"]).write_bytes(sample.picture)
    question, answer = sample.turns[0]
    row["conversations"] = [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    row["answers"] = list(sample.answers)
    return json.dumps(row, ensure_ascii=False) + "\n"


def make(job: tuple[Path, Path, str, int, range]) -> str:
    out, data, name, seed, numbers = job
    (out / f"pictures/{name}/{numbers.start // CHUNK:05d}").mkdir(parents=True, exist_ok=True)
    wordnet = read_json(data / "tiny-imagenet-classes.json")
    lines = []
    if name == "naming":
        photos = photos_of(data / "tiny-imagenet-val.tar")
        lines = [row_of(out, name, number, held_out_photo(photos[number], wordnet)) for number in numbers]
    else:
        photos = photos_of(data / "tiny-imagenet-train-0.tar", data / "tiny-imagenet-train-1.tar")
        for number in numbers:
            rng = random.Random(f"{seed}/naming-rows/{number}")
            lines.append(row_of(out, name, number, taught(rng, photos, wordnet)))
    return "".join(lines)


def write(out: Path, data: Path, name: str, rows: int, seed: int, workers: int) -> None:
    jobs = [(out, data, name, seed, range(first, min(first + CHUNK, rows))) for first in range(0, rows, CHUNK)]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        lines = "".join(pool.imap(make, jobs))
    (out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    print(f"{out / name}.jsonl: {rows:,} rows", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the picture tars")
    parser.add_argument("--out", type=Path, required=True, help="folder for the rows and their pictures")
    parser.add_argument("--rows", type=int, default=24_000, help="rows to learn from")
    parser.add_argument("--held-out", type=int, default=0, help="rows of the validation pictures to measure on; 5,000 are all")
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count(), help="processes")
    parser.add_argument("--seed", type=int, default=1, help="seed of what is chosen")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.rows:
        write(args.out, args.data, "rows", args.rows, args.seed, args.workers)
    if args.held_out:
        write(args.out, args.data, "naming", args.held_out, args.seed, args.workers)


if __name__ == "__main__":
    main()
