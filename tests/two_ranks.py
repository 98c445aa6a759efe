"""What one of two processes does for test_ranks.py: a few runs one after the other, so that two starts of Python are enough.

In: a model folder and a folder to write into; RANK, WORLD_SIZE and the rest in the environment.  Out: the runs' own folders.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from colours import colour_samples, interrupt_at, recipe_of
from tessella.chat import Message
from tessella.inputs import Picture
from tessella.train.dataset import Sample
from tessella.train.loop import train
from tessella.train.recipe import Recipe


def mixed_samples() -> list[Sample]:
    """Rows with one picture, with none, and with a wide one of several tiles; of different lengths."""
    samples = colour_samples(8)
    for number in range(3):
        said = (Message("user", "What is the capital of France?" + " Please answer." * number), Message("assistant", "Paris"))
        samples.append(Sample(f"text:{number}", said, (), f"text{number}"))
    wide = Image.new("RGB", (168, 56), (90, 90, 30))
    said = (Message("user", "<image>\nPlease describe the image shortly."), Message("assistant", "a plate of rice"))
    return [*samples, Sample("wide:0", said, (Picture(wide),), "wide")]


def ranks_recipe(folder: Path, output: Path, **changes: object) -> Recipe:
    # Small passes: the ranks then have several each, and not the same number.
    return recipe_of(folder, output, tokens_per_pass=64, max_tiles=3, **changes)


def main(folder: Path, home: Path) -> None:
    torch.set_num_threads(1)
    samples, held_out = mixed_samples(), colour_samples(5)

    def run(name: str, **changes: object) -> None:
        train(ranks_recipe(folder, home / name, **changes), samples=samples)

    run("ddp")
    run("fsdp2", parallel="fsdp2")
    run("zero2", parallel="zero2")
    run("fsdp2-all", parallel="fsdp2", tower="full", language="full", max_steps=2)
    # A run that began in one process goes on in two, and ends in two that share everything.
    moved = ranks_recipe(folder, home / "moved", resume=True)
    train(moved, samples=samples, on_event=interrupt_at(4))
    train(replace(moved, parallel="fsdp2"), samples=samples)
    # The other way round: what is begun here goes on alone.
    train(ranks_recipe(folder, home / "back", parallel="fsdp2"), samples=samples, on_event=interrupt_at(2))
    looked = ranks_recipe(folder, home / "looked", evaluate_every=3, sample_answers=5)
    train(looked, samples=samples, held_out=held_out)
    train(replace(looked, output=home / "looked-fsdp2", parallel="fsdp2"), samples=samples, held_out=held_out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
