"""Routing tokens: words of the model that hand its thoughts to a decoder, and what must follow them.

In: the size of a model's vocabulary.  Out: Routes: each token's id, its super-link queries, and the decoder it leads to.
The ids lie behind every row that the model already has, so a model without routing is not touched.
Source: VisionLLM v2, arXiv:2406.08394; modeling_visionllmv2.py of OpenGVLab/VisionLLM.
"""

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["boxes", "pictures"]

# [DET] every object of a class, [GRD] the one that is described, [SEG] outlines, [GEN] a new picture, [EDIT] a changed one.
KINDS: dict[str, Kind] = {"[DET]": "boxes", "[GRD]": "boxes", "[SEG]": "boxes", "[GEN]": "pictures", "[EDIT]": "pictures"}
QUERIES: dict[Kind, int] = {"boxes": 4, "pictures": 64}  # super-link queries behind a token


@dataclass(frozen=True)
class Route:
    """One routing token."""

    name: str
    token_id: int
    queries: int  # super-link queries that stand behind it
    first: int  # the row of its first query in the table of all queries

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]


@dataclass(frozen=True)
class Routes:
    """The routing tokens of one model, by id in a row. Empty for a model without routing."""

    each: tuple[Route, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.each)

    @property
    def first_id(self) -> int:
        """The id of the first routing token = the rows that the model has without them."""
        return self.each[0].token_id

    @property
    def queries(self) -> int:
        """Rows of the table of all queries."""
        return sum(route.queries for route in self.each)

    def of(self, token_id: int) -> Route | None:
        return self.each[token_id - self.first_id] if self.each and token_id >= self.first_id else None

    def named(self, name: str) -> Route:
        return next(route for route in self.each if route.name == name)

    def split(self, text: str) -> list[str]:
        """Text in which every second part is a routing token's name."""
        if not self.each:
            return [text]
        return re.split(f"({'|'.join(re.escape(route.name) for route in self.each)})", text)


def routes_for(vocabulary: int) -> Routes:
    """All five tokens behind a vocabulary of so many rows."""
    each, first = [], 0
    for place, (name, kind) in enumerate(KINDS.items()):
        each.append(Route(name, vocabulary + place, QUERIES[kind], first))
        first += QUERIES[kind]
    return Routes(tuple(each))
