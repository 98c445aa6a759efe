"""Rows that know what belongs behind their routing tokens, from scenes and from data with truth.

In: something that Asks (or any conversation with its truths).  Out: a TaughtInput, a ModelInput for all who only read it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from tessella.chat import Message
from tessella.inputs import Inputs, ModelInput, Picture
from tessella.model.decoders.boxes import mask_side
from tessella.routes import Kind, Route, Routes
from tessella.scenes.requests import Asks
from tessella.scenes.truth import Truth


@dataclass(frozen=True, eq=False)
class TaughtInput(ModelInput):
    """A row with the truth behind each routing token of its answers, in their order."""

    truths: tuple[Truth, ...] = ()
    routes: Routes = field(default_factory=Routes)


@dataclass(frozen=True, eq=False)
class Aim:
    """A truth as the losses want it, and small: it travels from the process that made it to the one that learns."""

    boxes: np.ndarray[Any, np.dtype[np.float32]]  # (M, 4) centre and size
    masks: np.ndarray[Any, np.dtype[np.float16]]  # (M, side, side) shares of what each point stands for; zeros where unknown
    known: bool  # whether the masks are
    picture: Image.Image | None


def aim_of(truth: Truth, side: int) -> Aim:
    """side: of the masks, which are shrunk to it."""
    edges = np.array(truth.boxes, dtype=np.float32).reshape(-1, 4)
    boxes = np.concatenate(((edges[:, :2] + edges[:, 2:]) / 2, edges[:, 2:] - edges[:, :2]), axis=1)
    masks = np.zeros((len(boxes), side, side), dtype=np.float16)
    for place, mask in enumerate(truth.masks):
        masks[place] = F.adaptive_avg_pool2d(torch.from_numpy(np.asarray(mask, dtype=np.float32))[None], side)[0].numpy()
    return Aim(boxes, masks, bool(truth.masks), truth.picture)


@dataclass(frozen=True, eq=False)
class Placed:
    """One aim and the place of its first super-link query in a pack."""

    row: int
    start: int
    route: Route
    aim: Aim

    @property
    def kind(self) -> Kind:
        return self.route.kind


def build_taught(inputs: Inputs, messages: Sequence[Message], pictures: Sequence[Picture], truths: Sequence[Truth]) -> ModelInput:
    """A conversation as it is learned from. The number of truths equals that of the routing tokens, or there is none."""
    row = inputs.build(messages, pictures, open_turn=False)
    if not truths or not inputs.tokenizer.routes:
        return row
    known = {one.name: getattr(row, one.name) for one in fields(row)}
    return TaughtInput(**known, truths=tuple(truths), routes=inputs.tokenizer.routes)


def build_request(inputs: Inputs, request: Asks) -> ModelInput:
    """A scene's question and answer as they are learned from."""
    asked = request.make()
    pictures = [] if asked.picture is None else [Picture(asked.picture)]
    return build_taught(inputs, asked.messages, pictures, asked.truths)


def placed(rows: Sequence[ModelInput]) -> tuple[Placed, ...]:
    """Where the queries of each truth begin when the rows lie back to back."""
    found, offset = [], 0
    for number, row in enumerate(rows):
        if isinstance(row, TaughtInput) and row.truths and row.queries is not None:
            begins = {route.first: route for route in row.routes.each}
            starts = [(place, begins[query]) for place, query in enumerate(row.queries.tolist()) if query in begins]
            assert len(starts) == len(row.truths), "each routing token has its truth"
            side = mask_side(row.tiles.shape[-1])
            found += [
                Placed(number, offset + place, route, aim_of(truth, side))
                for (place, route), truth in zip(starts, row.truths, strict=True)
            ]
        offset += len(row)
    return tuple(found)
