"""A step's work becomes logits: tiles are seen, tokens are embedded, the decoder is run over the blocks.

In: Batch.  Out: logits (R, V) of the rows that draw.
T new tokens of all rows back to back, D width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tessella.engine.lora import Adapter, Adapters, Run, Sight
from tessella.engine.paged import BlockStore, Paged
from tessella.engine.row import Row
from tessella.engine.scheduler import Batch, Part
from tessella.engine.vision import TileKey, VisionCache
from tessella.model.attend import Attend
from tessella.model.layers import rope_frequencies, rotary_at
from tessella.model.vision_language import VisionLanguageModel

if TYPE_CHECKING:
    from tessella.engine.graphs import DecodeGraphs


class Runner:
    """Touches the model, as the only one, in one thread. most_rows, longest_row: of any step to come."""

    def __init__(
        self,
        model: VisionLanguageModel,
        store: BlockStore,
        seen: VisionCache,
        *,
        cuda_graphs: bool,
        most_rows: int,
        longest_row: int,
    ):
        self.model = model
        self.store = store
        self.seen = seen
        self.adapters = Adapters(model)
        self.sight = Sight(model)
        language = model.config.language
        self.frequencies = rope_frequencies(language, 0, model.device)  # (D / 2,) of rows that are not stretched
        self.paged: Callable[[BlockStore, Sequence[Part], torch.device], Attend] = Paged
        self.graphs: DecodeGraphs | None = None
        self._undo: Callable[[], None] | None = None
        if model.device.type == "cuda" and model.dtype in (torch.bfloat16, torch.float16):
            self._take_kernels(most_rows, longest_row if cuda_graphs else None)

    @torch.inference_mode()
    def _take_kernels(self, most_rows: int, longest_row: int | None) -> None:
        """Run on a GPU with Triton and, unless longest_row is None, with graphs."""
        # Imported here: Triton comes with torch for CUDA alone.
        from tessella.engine.graphs import DecodeGraphs
        from tessella.engine.paged_cuda import PagedCuda
        from tessella.engine.swap import swap_in

        torch.cuda.set_device(self.model.device)  # where Triton launches
        self.paged = PagedCuda
        self._undo = swap_in(self.model)
        if longest_row is not None:
            self.graphs = DecodeGraphs(self.model, self.store, self.frequencies, most_rows, longest_row)

    def leave(self) -> None:
        """Give the model back as it was; no step may follow."""
        self.adapters.unhook()
        if self._undo is not None:
            self._undo()
            self._undo = None

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor | None:
        """The logits (R, V) of batch.drawing, None when no row draws."""
        parts = batch.parts
        if self.graphs is not None and self.graphs.fit(parts):
            return self.graphs.run(parts)
        visual = self._visual_tokens(batch)
        embeddings = self._embed(parts, visual)
        turn = rotary_at(self.model.config.language, *self._angles(parts), embeddings.dtype)
        attend = self.paged(self.store, parts, self.model.device)
        self.adapters.runs = self._runs(parts, [part.end - part.start for part in parts])
        hidden = self.model.language_model.run(embeddings, turn, attend)
        drawing = [part for part in parts if part.draws]
        if not drawing:
            return None
        ends = torch.tensor([part.end - part.start for part in parts]).cumsum(0) - 1
        last = ends[[i for i, part in enumerate(parts) if part.draws]].to(self.model.device)
        self.adapters.runs = self._runs(drawing, [1] * len(drawing))  # the head, too, may have a pair
        logits = self.model.logits(hidden[last])
        self.adapters.runs = ()
        return logits

    def _visual_tokens(self, batch: Batch) -> dict[TileKey, Tensor]:
        """The visual tokens of every tile that this step has slots of; new ones are seen now, all of one sight together."""
        needed = {row.tile_key(tile) for row, start, end in batch.parts for tile in row.tiles_in(start, end)}
        visual = {key: self.seen.get(key) for key in needed if key in self.seen}
        by_sight: dict[int, list[TileKey]] = {}
        for key in batch.tiles:
            by_sight.setdefault(key.sight, []).append(key)
        for keys in by_sight.values():
            places = [batch.tiles[key] for key in keys]
            tiles = torch.stack([row.request.prompt.tiles[tile] for row, tile in places]).to(self.model.device)
            prompts = [(row.request.prompt, tile) for row, tile in places]
            questions = [prompt.questions[tile] for prompt, tile in prompts if prompt.questions]
            tokens = self.sight.through(places[0][0].adapter, tiles, questions)
            for key, one in zip(keys, tokens.unbind(), strict=True):
                visual[key] = one
                self.seen.put(key, one.clone())  # a view would keep the whole batch
        return visual

    def _embed(self, parts: Sequence[Part], visual: dict[TileKey, Tensor]) -> Tensor:
        """(T, D), pictures in their slots."""
        ids = torch.tensor([token for row, start, end in parts for token in row.tokens[start:end]])
        embeddings = self.model.language_model.embed(ids.to(self.model.device))
        at = 0
        for row, start, end in parts:
            for tile in row.tiles_in(start, end):
                first, last = row.tile_ranges[tile]
                begin, stop = max(first, start), min(last, end)
                tokens = visual[row.tile_key(tile)][begin - first : stop - first]
                embeddings[at + begin - start : at + stop - start] = tokens.to(embeddings.dtype)
            at += end - start
        return embeddings

    def _angles(self, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
        """Positions (T,), and radians a position: (D / 2,) when all rows turn alike, else (T, D / 2)."""
        device = self.model.device
        positions = torch.cat([torch.arange(start, end) for _, start, end in parts]).to(device)
        if not any(row.stretched for row, _, _ in parts):
            return positions, self.frequencies
        each = [self._frequencies(row).expand(end - start, -1) for row, start, end in parts]
        return positions, torch.cat(each)

    def _frequencies(self, row: Row) -> Tensor:
        if not row.stretched:
            return self.frequencies
        return rope_frequencies(self.model.config.language, row.total, self.model.device)

    def _runs(self, parts: Sequence[Part], counts: Sequence[int]) -> list[Run]:
        """Neighbouring tokens of one adapter, joined; hooks are hung where they are missing."""
        runs: list[Run] = []
        at = 0
        for part, count in zip(parts, counts, strict=True):
            adapter: Adapter | None = part.row.adapter
            if adapter is not None and runs and runs[-1].adapter is adapter and runs[-1].end == at:
                runs[-1] = Run(adapter, runs[-1].start, at + count)
            elif adapter is not None:
                self.adapters.hook(adapter)
                runs.append(Run(adapter, at, at + count))
            at += count
        return runs
