"""The losses of a run, watched: what is not finite and what jumps is found, with the samples of that step.

In: loss and gradient norm of each step, still on the device.  Out: their values; BadLoss where the run must not go on as it is.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tessella.train.recipe import Recipe

BEFORE = 64  # steps that a jump is measured against
FEWEST = 8  # of them, before anything is called a jump
JUMP = 1.0  # nats above the median: four times nearly nothing is still nearly nothing
NAMED = 16  # samples named in a message
Everyone = Callable[[tuple[str, ...]], tuple[str, ...]]


@dataclass(frozen=True)
class Unread:
    """A step whose loss is still on the device."""

    step: int  # counted from 1
    loss: Tensor
    norm: Tensor
    places: tuple[str, ...]


class BadLoss(Exception):
    """A step after which the run must not simply go on. It is answered in loop.py and reaches no caller."""

    def __init__(self, step: int, told: str, answer: str):
        super().__init__(told)
        self.step, self.told, self.answer = step, told, answer  # answer: "stop" or "back"


class Watch:
    """Holds losses on the device until read() brings them over together, so that no step waits for the device."""

    def __init__(self, recipe: Recipe, total_steps: int):
        self.recipe, self.total_steps = recipe, total_steps
        self.unread: list[Unread] = []
        self.recent: list[list[float]] = []  # loss and norm of the steps since the last report
        self.before: deque[float] = deque(maxlen=BEFORE)

    def add(self, step: int, loss: Tensor, norm: Tensor, places: tuple[str, ...]) -> None:
        self.unread.append(Unread(step, loss, norm, places))

    def read(self, everyone: Everyone) -> list[str]:
        """Bring the losses over and check them; gives what is to be told of jumps. Raises BadLoss at the first bad step.

        everyone: the samples of a step on this rank -> those on all ranks. Losses are equal on all, so all ask together.
        """
        told: list[str] = []
        unread, self.unread = self.unread, []
        if not unread:
            return told
        values = torch.stack([torch.stack((one.loss, one.norm.to(one.loss))) for one in unread]).tolist()
        for one, (loss, norm) in zip(unread, values, strict=True):
            self._check_finite(one, loss, norm, everyone)
            jump = self._jump(one, loss, everyone)
            if jump and self.recipe.on_spike != "tell":
                raise BadLoss(one.step, jump, self.recipe.on_spike)
            told += [jump] if jump else []
            self.before.append(loss)
            self.recent.append([loss, norm])
        return told

    def _check_finite(self, one: Unread, loss: float, norm: float, everyone: Everyone) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what = "loss" if not math.isfinite(loss) else "gradient"
        told = (
            f"the {what} is not finite at step {one.step} of {self.total_steps} (loss {loss}, gradient norm {norm}). "
            f"Its samples: {named(everyone(one.places))}. Lower learning_rate (now {self.recipe.learning_rate:g}), or look at "
            "these samples"
        )
        raise BadLoss(one.step, told, self.recipe.on_nan)

    def _jump(self, one: Unread, loss: float, everyone: Everyone) -> str:
        """What is to be told when the loss jumps at a step, "" when it does not."""
        if len(self.before) < FEWEST:
            return ""
        median = statistics.median(self.before)
        if loss <= max(self.recipe.spike * median, median + JUMP):
            return ""
        return (
            f"the loss jumps at step {one.step} of {self.total_steps}: {loss:.4f}, where the median of {len(self.before)} steps "
            f"before is {median:.4f} (spike is {self.recipe.spike:g}). Its samples: {named(everyone(one.places))}"
        )

    def state(self) -> tuple[list[list[float]], list[float]]:
        """What a resumed run needs, so that its reports and its median are those of a run that was never stopped."""
        return [list(pair) for pair in self.recent], list(self.before)

    def restore(self, recent: Sequence[Sequence[float]], before: Sequence[float]) -> None:
        self.unread = []
        self.recent = [list(pair) for pair in recent]
        self.before = deque(before, maxlen=BEFORE)


def named(places: Sequence[str]) -> str:
    """The first samples by file and line."""
    more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
    return ", ".join(places[:NAMED]) + more
