"""A step on a GPU in 16-bit types: through a captured graph where all rows grow, else launch by launch.

In: parts of a step.  Out: hidden states, or logits of a captured step.
T new tokens, C width, V vocabulary, D width of a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tessella.engine.fast import FastDecoder
from tessella.engine.graphs import DecodeGraphs, DecodeStep
from tessella.engine.kernels.attend import Turn, turn_and_put
from tessella.engine.kernels.prompts import QUERIES_AT_ONCE, Plan, fits, look_back
from tessella.engine.lora import Adapters
from tessella.engine.paged import BlockStore
from tessella.engine.paged_cuda import PagedCuda
from tessella.engine.request import EngineSettings
from tessella.engine.scheduler import Part
from tessella.model.layers import rotary_at
from tessella.model.vision_language import VisionLanguageModel


class FastRun:
    """most_rows, longest_row: of any step to come. drawn: where captured steps find and leave ids."""

    @torch.inference_mode()
    def __init__(
        self,
        model: VisionLanguageModel,
        adapters: Adapters,
        store: BlockStore,
        drawn: Tensor,
        frequencies: Tensor,
        settings: EngineSettings,
        most_rows: int,
        longest_row: int,
    ):
        self.model, self.store, self.frequencies = model, store, frequencies
        self.own_prompts = settings.own_prompts
        self.decoder = FastDecoder(model, adapters, single=settings.own_products)
        positions = torch.arange(longest_row, device=model.device)
        self.cosine, self.sine = self._table(positions, frequencies)
        self._warm()
        self.graphs: DecodeGraphs | None = None
        if settings.cuda_graphs:
            step = DecodeStep(self.decoder, store, self.cosine, self.sine, drawn, longest_row)
            self.graphs = DecodeGraphs(step, most_rows)

    def _warm(self) -> None:
        """Compile what no graph holds, on a token for the block that is nobody's: the first prompt need not wait for it."""
        heads, layer = self.decoder.heads, self.decoder.layers[0]
        qkv = torch.zeros((1, heads.columns), device=self.model.device, dtype=self.model.dtype)
        zero = torch.zeros(1, device=self.model.device, dtype=torch.int64)
        slots = zero + self.store.filler * self.store.heads * self.store.block_tokens
        turn = Turn(self.cosine, self.sine, zero.to(torch.int32))
        keys, values = self.store.keys[0], self.store.values[0]
        turn_and_put(qkv, heads, turn, layer.head_norms, slots, keys, values)
        if self.own_prompts and fits(self.store.block_tokens):
            table = torch.full((1, 1), self.store.filler, device=self.model.device, dtype=torch.int32)
            places = torch.zeros((3, 1), device=self.model.device, dtype=torch.int32)
            for queries in QUERIES_AT_ONCE.values():
                look_back(qkv, heads, Plan(places, places[0] + 1, queries), keys, values, table)

    def _table(self, positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine (T, D) of positions (T,)."""
        cosine, sine = rotary_at(self.model.config.language, positions, frequencies, self.model.dtype)
        return cosine[:, 0].contiguous(), sine[:, 0].contiguous()

    def captured(self, parts: Sequence[Part]) -> Tensor | None:
        """Logits (R, V), and ids in drawn; None for a step that is not held by a graph."""
        return self.graphs.run(parts) if self.graphs is not None and self.graphs.fit(parts) else None

    def hidden(self, embeddings: Tensor, parts: Sequence[Part], positions: Tensor, frequencies: Tensor) -> Tensor:
        """embeddings (T, C), positions (T,), frequencies (D / 2,) or (T, D / 2) -> normed hidden states (T, C)."""
        if frequencies is self.frequencies:
            turn = Turn(self.cosine, self.sine, positions.to(torch.int32))
        else:
            every = torch.arange(len(positions), dtype=torch.int32, device=positions.device)
            turn = Turn(*self._table(positions, frequencies), every)
        attend = PagedCuda(self.store, self.decoder.heads, turn, parts, self.model.device, own=self.own_prompts)
        return self.decoder.run(embeddings, attend)
