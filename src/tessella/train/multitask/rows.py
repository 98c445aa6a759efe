"""Rows that know what belongs behind their routing tokens, from scenes and from data with truth.

In: something that Asks (or any conversation with its truths).  Out: a TaughtInput, a ModelInput for all who only read it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from tessella.chat import Message
from tessella.inputs import Inputs, ModelInput, Picture
from tessella.routes import Kind, Route, Routes
from tessella.scenes.requests import Asks
from tessella.scenes.truth import Truth


@dataclass(frozen=True, eq=False)
class TaughtInput(ModelInput):
    """A row with the truth behind each routing token of its answers, in their order."""

    truths: tuple[Truth, ...] = ()
    routes: Routes = field(default_factory=Routes)


@dataclass(frozen=True, eq=False)
class Placed:
    """One truth and the place of its first super-link query in a pack."""

    row: int
    start: int
    route: Route
    truth: Truth

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
            found += [
                Placed(number, offset + place, route, truth) for (place, route), truth in zip(starts, row.truths, strict=True)
            ]
        offset += len(row)
    return tuple(found)
