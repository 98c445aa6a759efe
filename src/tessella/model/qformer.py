"""The Q-Former: a few learned queries read a picture and, beside them, a text.

In: queries (N, Q, C), image features (N, P, Cv), token ids (N, T).  Out: states (N, Q + T, C), queries first.
N pictures, Q queries, P patches (class token among them), T tokens of text, S = Q + T, C width, Cv the tower's width.
Self-attention is shared between queries and text; each has a feed-forward half of its own; in every second layer the queries
look at the picture. What queries and text see of one another is a mask: the three of BLIP-2's first stage are `sight`.
Source: BLIP-2, arXiv:2301.12597; Qformer.py of salesforce/LAVIS at lavis/models/blip2_models; Blip2QFormerModel of
huggingface/transformers at 5.23, whose numbers it gives.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tessella.config import QFormerConfig

SPREAD = 0.02  # of weights that nobody has taught yet
Sight = Literal["apart", "together", "generate"]


def sight(kind: Sight, queries: int, real: Tensor) -> Tensor:
    """What may be seen: (N, S, S) bool, true where the row sees the column. real (N, T) bool: false on padding.

    "apart": queries and text are blind to one another (contrast). "together": all see all (matching). "generate": text sees
    the queries and the text before it, the queries do not see the text (generation). Padding is seen by nobody.
    """
    n, t = real.shape
    seen = torch.ones(queries + t, queries + t, dtype=torch.bool, device=real.device)
    if kind != "together":
        seen[:queries, queries:] = False
    if kind == "apart":
        seen[queries:, :queries] = False
    if kind == "generate":
        seen[queries:, queries:] = seen[queries:, queries:].tril()
    padded = torch.cat((real.new_ones(n, queries), real), dim=1)
    return seen & padded[:, None, :]


class Attention(nn.Module):
    """Attention and what BERT sets behind it: projection, sum, norm. width: of what is looked at."""

    def __init__(self, config: QFormerConfig, width: int):
        super().__init__()
        c = config.hidden_size
        self.num_heads = config.num_heads
        self.query, self.key, self.value = nn.Linear(c, c), nn.Linear(width, c), nn.Linear(width, c)
        self.dense = nn.Linear(c, c)
        self.norm = nn.LayerNorm(c, eps=config.norm_eps)

    def forward(self, x: Tensor, looked_at: Tensor, seen: Tensor | None = None) -> Tensor:
        """x (N, S, C), looked_at (N, K, width), seen (N, S, K) bool or None for all -> (N, S, C)."""
        q, k, v = self.query(x), self.key(looked_at), self.value(looked_at)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        mask = None if seen is None else seen[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return self.norm(self.dense(out) + x)


class FeedForward(nn.Module):
    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc2(F.gelu(self.fc1(x))) + x)


class Layer(nn.Module):
    """One layer; cross: whether its queries look at the picture. The text's half is missing where there is never a text."""

    def __init__(self, config: QFormerConfig, cross: bool):
        super().__init__()
        self.attention = Attention(config, config.hidden_size)
        self.cross = Attention(config, config.image_width) if cross else None
        self.queries = FeedForward(config)
        self.text = FeedForward(config) if config.text else None

    def forward(self, x: Tensor, count: int, image: Tensor | None, seen: Tensor | None) -> Tensor:
        """x (N, S, C), the first count of S are queries; image (N, P, Cv), needed where there are queries."""
        x = self.attention(x, x, seen)
        queries, text = x[:, :count], x[:, count:]
        parts = []
        if count:
            if self.cross is not None:
                assert image is not None, "queries look at a picture"
                queries = self.cross(queries, image)
            parts.append(self.queries(queries))
        if text.shape[1]:
            assert self.text is not None, "this Q-Former was made without a text half"
            parts.append(self.text(text))
        return torch.cat(parts, dim=1)


class QFormer(nn.Module):
    """All layers, and the tables of the text where there is a text half."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.config = config
        if config.text:
            self.words = nn.Embedding(config.vocab_size, config.hidden_size)
            self.places = nn.Embedding(config.max_positions, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.layers = nn.ModuleList(Layer(config, number % config.cross_every == 0) for number in range(config.num_layers))

    def forward(
        self, queries: Tensor | None, image: Tensor | None, ids: Tensor | None = None, seen: Tensor | None = None
    ) -> Tensor:
        """queries (N, Q, C), image (N, P, Cv), ids (N, T), seen (N, S, S) or None for all -> (N, S, C)."""
        parts = [] if queries is None else [queries]
        if ids is not None:
            parts.append(self.words(ids) + self.places.weight[: ids.shape[1]])
        x, count = self.norm(torch.cat(parts, dim=1)), 0 if queries is None else queries.shape[1]
        for layer in self.layers:
            x = layer(x, count, image, seen)
        return x


def begin_small(module: nn.Module) -> None:
    """Weights as BERT's begin: normal with a spread of 0.02, biases zero."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=SPREAD)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)


class Queries(nn.Module):
    """The learned queries and the Q-Former that they read a picture with; the first layer of a connector."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_queries, config.hidden_size))
        self.former = QFormer(config)
        nn.init.normal_(self.query_tokens, std=SPREAD)
        begin_small(self)

    def forward(self, image: Tensor, questions: Sequence[Sequence[int]] = ()) -> Tensor:
        """Features (N, P, Cv), and ids of a question for each picture if the text half is to read one -> (N, Q, C)."""
        queries = self.query_tokens.to(image.dtype).expand(len(image), -1, -1)
        if not questions:
            return self.former(queries, image)
        rows = [torch.tensor(row, dtype=torch.int64) for row in questions]
        ids = pad_sequence(rows, batch_first=True).to(image.device)
        lengths = torch.tensor([len(row) for row in rows], device=image.device)
        real = torch.arange(ids.shape[1], device=image.device) < lengths[:, None]
        states = self.former(queries, image, ids, sight("together", queries.shape[1], real))
        return states[:, : queries.shape[1]]
