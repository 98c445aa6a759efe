"""Where a run's numbers go beside its JSON lines: TensorBoard, Weights & Biases, SwanLab.

In: numbers and answers by step.  Out: what each of them shows. A package that is not installed gives a sentence at the start.
"""

import importlib
import re
from typing import Any, Protocol

import numpy as np
from PIL import Image

from tessella.errors import ConfigError
from tessella.files import cannot_write
from tessella.train.recipe import Recipe

TENSORBOARD = "tensorboard"
PROJECT = "tessella"


class Tracker(Protocol):
    def tell(self, step: int, values: dict[str, Any]) -> None:
        """values: numbers by name; "answers" holds rows of question, expected, answer and picture."""

    def close(self) -> None: ...


class Scalars(Protocol):
    """The part of TensorBoard's SummaryWriter that we use."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...
    def add_text(self, tag: str, text_string: str, global_step: int) -> None: ...
    def add_image(self, tag: str, img_tensor: Any, global_step: int, dataformats: str) -> None: ...
    def close(self) -> None: ...


class Board:
    """Weights & Biases, and SwanLab, which has the same few names."""

    def __init__(self, name: str, recipe: Recipe):
        try:
            # Chosen by name in the recipe; neither is among our dependencies.
            self.module: Any = importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"trackers names {name}, which is not installed: pip install {name}, or leave it out of --trackers"
            ) from error
        self.output = recipe.output
        # One id a folder: a resumed run goes on in its own curve. Only letters, digits and dashes are taken everywhere.
        run_id = re.sub(r"[^A-Za-z0-9]+", "-", str(recipe.output.resolve()))[-60:].strip("-").lower()
        names = {"wandb": ("name", "dir"), "swanlab": ("experiment_name", "logdir")}[name]
        whose = dict(zip(names, (recipe.output.name, str(recipe.output)), strict=True))
        self.module.init(project=PROJECT, id=run_id, resume="allow", config=recipe.settled(), **whose)

    def tell(self, step: int, values: dict[str, Any]) -> None:
        told: dict[str, Any] = {name: value for name, value in values.items() if isinstance(value, int | float)}
        shown = [row for row in values.get("answers", []) if "picture" in row]
        if shown:
            told["answers"] = [self.module.Image(str(self.output / row["picture"]), caption=caption(row)) for row in shown]
        if told:
            self.module.log(told, step=step)

    def close(self) -> None:
        self.module.finish()


class TensorBoard:
    def __init__(self, recipe: Recipe, first_step: int):
        from torch.utils.tensorboard import SummaryWriter  # heavy (a second) and in the train extra only

        self.output = recipe.output
        try:
            self.writer: Scalars = SummaryWriter(str(recipe.output / TENSORBOARD), purge_step=first_step + 1)
        except OSError as error:
            raise cannot_write(recipe.output / TENSORBOARD, error) from error

    def tell(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(name, value, step)
        answers = values.get("answers", [])
        if answers:
            self.writer.add_text("answers", "\n\n".join(caption(row) for row in answers), step)
        for number, row in enumerate(answers):
            if "picture" in row:
                with Image.open(self.output / row["picture"]) as picture:
                    self.writer.add_image(f"answers/{number}", np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


def caption(row: dict[str, str]) -> str:
    return f"{row['question'].replace('<image>', '').strip()} → {row['answer']} (expected: {row['expected']})"


def open_trackers(recipe: Recipe, first_step: int) -> list[Tracker]:
    """Those that the recipe names. Raises ConfigError for one that is not installed, WriteError."""
    opened: list[Tracker] = [TensorBoard(recipe, first_step)] if recipe.tensorboard else []
    return opened + [Board(name, recipe) for name in recipe.trackers]
