"""Stages 2 and 3 of tessella-nano: run a recipe on the rows of make_data.py with the project's own training.

It does what `tessella finetune RECIPE` does, but takes the rows as they are: make_data.py has just written them, so hundreds of
thousands of pictures need no second look.  In: a recipe, JSONL files.  Out: recipe.output.
"""

import argparse
import json
from pathlib import Path

from tessella.chat import Message
from tessella.image import Size
from tessella.inputs import Picture
from tessella.train.dataset import Sample
from tessella.train.loop import train
from tessella.train.recipe import load_recipe

ROLES = {"human": "user", "gpt": "assistant"}
SIZE = Size(224, 224)


def samples_of(path: Path, repeat: int = 1) -> list[Sample]:
    """One sample a row; text-only rows have no picture."""
    samples = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            row = json.loads(line)
            if "messages" in row:
                messages = tuple(Message(m["role"], m["content"]) for m in row["messages"])
            else:
                messages = tuple(Message(ROLES[t["from"]], t["value"]) for t in row["conversations"])
            pictures = (Picture(path.parent / row["image"], max_tiles=1),) if "image" in row else ()
            for again in range(repeat):
                place = f"{path.name}:{number}"
                samples.append(Sample(place, messages, pictures, key=f"{place}/{again}", sizes=(SIZE,) * len(pictures)))
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--rows", type=Path, nargs="+", required=True, help="JSONL files of make_data.py")
    parser.add_argument("--held-out-rows", type=int, default=512, help="rows of the first file that are not learned from")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="recipe fields to override")
    args = parser.parse_args()
    overrides = {}
    for pair in args.set:
        field, _, value = pair.partition("=")
        try:
            overrides[field] = json.loads(value)
        except json.JSONDecodeError:
            overrides[field] = value
    recipe = load_recipe(args.recipe, overrides)
    samples = [sample for path in args.rows for sample in samples_of(path)]
    result = train(recipe, samples=samples[args.held_out_rows :], held_out=samples[: args.held_out_rows])
    print(json.dumps(result.as_json() | {"losses": result.losses[-3:]}, ensure_ascii=False))


if __name__ == "__main__":
    main()
