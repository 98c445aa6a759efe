"""An independent judge of drawn foods: a small network that has seen nothing but the shipped drawings.

In: the shipped drawings, turned, moved, mirrored, coloured, blurred; none that a model has made, and no weight of one.
Out: Judged, which names the food on a picture and says what it got right of views that it was not taught on.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tessella.errors import DataError
from tessella.files import write_whole
from tessella.foods import STYLES, Food, foods
from tessella.scenes.compose import cut_out

SIDE_PX = 64  # as large as the built-in decoder draws
STEPS, VIEWS_A_STEP, RATE = 500, 96, 4e-3
HELD_OUT_VIEWS = 968  # two of each food in each style
STRIDE = 101  # no divisor of the drawings' number: each batch holds many foods, and all come equally often


class Judge(nn.Module):
    """Four convolutions and a mean: pictures (N, 3, 64, 64) in -1 to 1 -> logits (N, foods)."""

    def __init__(self, classes: int):
        super().__init__()
        widths = (3, 32, 64, 128, 160)
        blocks = []
        for number, (before, after) in enumerate(pairwise(widths)):
            stride = 2 if number < 3 else 1
            blocks += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1] * 4, classes)  # a quarter of the picture each: where a thing is told counts a little

    def forward(self, pictures: Tensor) -> Tensor:
        return torch.as_tensor(self.head(F.adaptive_avg_pool2d(self.body(pictures), 2).flatten(1)))


@dataclass(frozen=True, eq=False)
class Judged:
    """A judge, and what it named right of views of the shipped drawings that it was not taught on."""

    judge: Judge
    right: int
    views: int

    @torch.inference_mode()
    def name(self, picture: Image.Image) -> Food:
        """The food that a picture shows, of those shipped."""
        return foods()[int(self.judge(as_seen(picture)[None]).argmax())]


def judge_at(path: Path, say: Callable[[str], None], *, steps: int = STEPS) -> Judged:
    """The judge that is kept in a file; taught and put there when the file is not there yet.

    Raises DataError for a file that holds something else, WriteError when it cannot be written.
    """
    if path.exists():
        return _read(path)
    say(f"teaching the judge of drawn foods ({steps} steps of {VIEWS_A_STEP} views; kept at {path})")
    judge = teach(steps)
    with torch.inference_mode():
        seen = [(judge(pictures).argmax(1) == wanted).sum() for pictures, wanted in _views("held out", HELD_OUT_VIEWS // 88, 88)]
    right = int(torch.stack(seen).sum())
    judged = Judged(judge, right, HELD_OUT_VIEWS)
    told = {"judge": json.dumps({"foods": len(foods()), "right": right, "views": HELD_OUT_VIEWS})}
    write_whole(path, save({name: value.contiguous() for name, value in judge.state_dict().items()}, metadata=told))
    return judged


def _read(path: Path) -> Judged:
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {})["judge"])
            names = file.keys()
            state = {name: file.get_tensor(name) for name in names}
        judge = Judge(told["foods"])
        judge.load_state_dict(state)
        right, views = int(told["right"]), int(told["views"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{path} holds no judge of drawn foods ({error}); name a file that is not there yet") from error
    if told["foods"] != len(foods()):
        raise DataError(f"{path} knows {told['foods']} foods, {len(foods())} are shipped; name a file that is not there yet")
    return Judged(judge.eval(), right, views)


def teach(steps: int) -> Judge:
    """Cross-entropy over views of the shipped drawings in all styles. The same steps give the same judge on one machine."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        judge = Judge(len(foods())).train()
    adam = torch.optim.AdamW(judge.parameters(), lr=RATE, weight_decay=0.02)
    rates = torch.optim.lr_scheduler.OneCycleLR(adam, RATE, total_steps=steps)
    for pictures, wanted in _views("taught", steps, VIEWS_A_STEP):
        loss = F.cross_entropy(judge(pictures), wanted, label_smoothing=0.05)
        adam.zero_grad()
        loss.backward()
        adam.step()
        rates.step()
    return judge.eval()


def _views(part: str, batches: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of views and the numbers of their foods: every food in every style in turn."""
    kinds = [(number, style) for style in STYLES for number in range(len(foods()))]
    for batch in range(batches):
        chance = random.Random(f"judge/{part}/{batch}")
        chosen = [kinds[(batch * size + k) * STRIDE % len(kinds)] for k in range(size)]
        shown = [as_seen(view(foods()[number], style, chance)) for number, style in chosen]
        yield torch.stack(shown), torch.tensor([number for number, _ in chosen])


def view(food: Food, style: str, chance: random.Random) -> Image.Image:
    """A shipped drawing as it may be drawn again: a little smaller, turned, mirrored, of other colours, blurred."""
    drawing = cut_out(food, style)[0]
    if chance.random() < 0.5:
        drawing = ImageOps.mirror(drawing)
    drawing = drawing.rotate(chance.uniform(-15, 15), Image.Resampling.BICUBIC, fillcolor=(255, 255, 255))
    side = round(SIDE_PX * chance.uniform(0.75, 1.1))
    page = Image.new("RGB", (SIDE_PX, SIDE_PX), (255, 255, 255))
    room = SIDE_PX - side
    at = tuple(chance.randint(min(0, room), max(0, room)) for _ in range(2))
    page.paste(drawing.resize((side, side), Image.Resampling.BICUBIC), (at[0], at[1]))
    for change in (ImageEnhance.Brightness, ImageEnhance.Color, ImageEnhance.Contrast):
        page = change(page).enhance(chance.uniform(0.75, 1.25))
    return page.filter(ImageFilter.GaussianBlur(chance.uniform(0, 1.2)))


def as_seen(picture: Image.Image) -> Tensor:
    """A picture -> (3, 64, 64) in -1 to 1."""
    small = picture.convert("RGB").resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(small, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)
