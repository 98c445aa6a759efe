"""A small set to learn from, the recipe that learns it in seconds, and Ctrl-C at a step: for tests of training.

In: a model folder and an output folder.  Out: samples and a Recipe.
"""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from PIL import Image

from tessella.chat import Message
from tessella.inputs import Picture
from tessella.train.dataset import Sample
from tessella.train.log import Event
from tessella.train.recipe import Recipe

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (30, 40, 200), "white": (240, 240, 240)}


def colour_samples(count: int = 12) -> list[Sample]:
    """Pictures of one colour, told apart by a spot; the answer names the colour."""
    out = []
    for i in range(count):
        name = list(COLOURS)[i % 4]
        picture = Image.new("RGB", (56, 56), COLOURS[name])
        picture.putpixel((i % 56, i // 56), (0, 0, 0))
        messages = (Message("user", "<image>\nname the photo"), Message("assistant", name))
        out.append(Sample(f"made:{i}", messages, (Picture(picture),), f"key{i}"))
    return out


def recipe_of(folder: Path, output: Path, **changes: object) -> Recipe:
    base = Recipe(
        model=str(folder), device="cpu", dtype="float32", samples_per_step=4, epochs=2.0, output=output, tensorboard=False,
        report_every=1, evaluate_every=0, sample_answers=0, learning_rate=5e-3, lora_rank=4, lora_dropout=0.0, max_bad_share=0.1,
    )  # fmt: skip
    return replace(base, **changes)


def interrupt_at(step: int) -> Callable[[Event], None]:
    """Ctrl-C as soon as that step is reported."""

    def on_event(event: Event) -> None:
        if event.kind == "step" and event.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return on_event
