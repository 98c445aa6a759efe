"""Routing beside a model: new words, the super-link queries behind them, and the decoders that read what the queries became.

In: ids (T,) of which some are routing tokens, queries (T,) naming the super-link query of a place or -1.
Out: embeddings (T, D), logits (T, R) of the R routing tokens.  D width of the language model, V its vocabulary.
The model's own table and head are not touched: the new rows stand here, behind them.
Source: VisionLLM v2, arXiv:2406.08394; modeling_visionllmv2.py of OpenGVLab/VisionLLM.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessella.model.decoders.boxes import BoxDecoder
from tessella.model.decoders.pictures import PictureDecoder
from tessella.routes import Kind, Route, Routes


class Routing(nn.Module):
    """New embedding and head rows, query table, and the decoders that are there; a decoder that is None is missing."""

    def __init__(self, routes: Routes, width: int):
        super().__init__()
        self.routes = routes
        self.tokens = nn.Parameter(torch.zeros(len(routes.each), width))
        self.head = nn.Parameter(torch.zeros(len(routes.each), width))
        self.queries = nn.Parameter(torch.zeros(routes.queries, width))
        self.boxes: BoxDecoder | None = None
        self.pictures: PictureDecoder | None = None
        self.missing: dict[Kind, str] = {}  # why a decoder is not there, for people

    def drop(self, kind: Kind, why: str) -> None:
        """Do without a decoder; why is told when its token is chosen."""
        self.missing[kind] = why
        setattr(self, kind, None)

    @torch.no_grad()
    def begin(self, table: Tensor, head: Tensor, chance: torch.Generator) -> None:
        """Start from the means of the old rows, as InternVL's own new tokens did, told apart by noise of a tenth of their spread.

        table, head (V, D). The queries are drawn with the table's spread.
        """
        for rows, old in ((self.tokens, table), (self.head, head)):
            noise = torch.randn(rows.shape, generator=chance).to(rows) * old.float().std(0).to(rows) / 10
            rows.copy_(old.float().mean(0).to(rows) + noise)
        spread = table.float().std().to(self.queries)
        self.queries.copy_(torch.randn(self.queries.shape, generator=chance).to(self.queries) * spread)

    def embed(self, old: Callable[[Tensor], Tensor], ids: Tensor, queries: Tensor | None) -> Tensor:
        """old: the model's own lookup; ids (T,), queries (T,) or None -> embeddings (T, D)."""
        first = self.routes.first_id
        out = old(ids.clamp(max=first - 1))
        new = (ids >= first)[:, None]
        out = torch.where(new, self.tokens[(ids - first).clamp(min=0)].to(out.dtype), out)
        if queries is None:
            return out
        return torch.where((queries >= 0)[:, None], self.queries[queries.clamp(min=0)].to(out.dtype), out)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (T, D) -> logits (T, R)."""
        return F.linear(hidden, self.head.to(hidden.dtype))


@dataclass(frozen=True, eq=False)
class Routed:
    """A model chose a routing token: what its super-link queries became."""

    row: int  # of the batch
    route: Route
    said: int  # tokens of the answer up to and with the routing token
    states: Tensor  # (queries, D)
