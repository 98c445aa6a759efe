"""A step's work becomes logits: views are seen, tokens are embedded, the decoder is run over the blocks.

In: Batch.  Out: Outcome, the logits (R, V) of the rows that draw and their likeliest ids.
T new tokens of all rows back to back, D width, V vocabulary.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tessella.engine.draw import likeliest
from tessella.engine.lora import Adapter, Adapters, Run, Sight
from tessella.engine.paged import BlockStore, Paged
from tessella.engine.request import EngineSettings
from tessella.engine.row import Row
from tessella.engine.scheduler import Batch, Part
from tessella.engine.vision import ViewKey, VisionCache
from tessella.model.layers import rope_frequencies, rotary_at
from tessella.model.vision_language import VisionLanguageModel
from tessella.transfer import sent, sent_together

if TYPE_CHECKING:
    from tessella.engine.fast_run import FastRun
    from tessella.engine.fast_sight import FastTower


class Outcome(NamedTuple):
    """Of the rows that draw, on the device, perhaps still being computed; to be used before the next run."""

    logits: Tensor  # (R, V)
    drawn: Tensor  # (2, R) int64: the likeliest ids, and whether logits are finite


class Runner:
    """Touches the model, as the only one, in one thread. most_rows, longest_row: of any step to come."""

    def __init__(
        self,
        model: VisionLanguageModel,
        store: BlockStore,
        seen: VisionCache,
        *,
        settings: EngineSettings,
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
        self.drawn = torch.zeros((2, 2 * most_rows + 32), dtype=torch.int64, device=model.device)  # of the last step: see Drawing
        self.fast: FastRun | None = None
        self.tower: FastTower | None = None
        if model.device.type == "cuda" and model.dtype in (torch.bfloat16, torch.float16) and settings.kernels:
            torch.cuda.set_device(model.device)  # where Triton launches
            self.take_kernels(settings, most_rows, longest_row)

    def take_kernels(self, settings: EngineSettings, most_rows: int, longest_row: int) -> None:
        """Run with Triton and, if so set, with graphs."""
        # Imported here: Triton comes with torch for CUDA alone.
        from tessella.engine.fast_run import FastRun
        from tessella.engine.fast_sight import FastTower

        self.tower = self.sight.tower = FastTower(self.model.vision_model)
        self.fast = FastRun(self.model, self.adapters, self.store, self.drawn, self.frequencies, settings, most_rows, longest_row)

    @torch.inference_mode()
    def enter_thread(self, most_tiles: int) -> None:
        """To be called once in the thread that will call run. most_tiles: of one step."""
        if self.model.device.type == "cuda":
            torch.cuda.set_device(self.model.device)
        if self.tower is not None:
            self.tower.warm(most_tiles)

    def leave(self) -> None:
        """Give the model back as it was; no step may follow."""
        self.adapters.unhook()

    @torch.inference_mode()
    def run(self, batch: Batch) -> Outcome | None:
        """Of batch.drawing, None when no row draws. The host waits for nothing that runs on a GPU."""
        parts = batch.parts
        if self.fast is not None and (logits := self.fast.captured(parts)) is not None:
            return Outcome(logits, self.drawn[:, : len(parts)])
        visual = self._visual_tokens(batch)
        embeddings = self._embed(parts, visual)
        positions, frequencies = self._angles(parts)
        self.adapters.runs = self._runs(parts, [part.end - part.start for part in parts])
        if self.fast is not None:
            hidden = self.fast.hidden(embeddings, parts, positions, frequencies)
        else:
            turn = rotary_at(self.model.config.language, positions, frequencies, embeddings.dtype)
            hidden = self.model.language_model.run(embeddings, turn, Paged(self.store, parts, self.model.device))
        drawing = [part for part in parts if part.draws]
        if not drawing:
            self.adapters.runs = ()
            return None
        ends = torch.tensor([part.end - part.start for part in parts]).cumsum(0) - 1
        last = sent(ends[[i for i, part in enumerate(parts) if part.draws]], self.model.device)
        self.adapters.runs = self._runs(drawing, [1] * len(drawing))  # the head, too, may have a pair
        logits = self.model.logits(hidden[last]) if self.fast is None else self.fast.decoder.logits(hidden[last])
        self.adapters.runs = ()
        drawn = self.drawn[:, : len(drawing)]
        drawn.copy_(likeliest(logits))
        return Outcome(logits, drawn)

    def _visual_tokens(self, batch: Batch) -> dict[ViewKey, Tensor]:
        """The visual tokens of every view that this step has slots of; new ones are seen now, all of one sight together."""
        needed = {row.view_key(view) for row, start, end in batch.parts for view in row.views_in(start, end)}
        visual = {key: self.seen.get(key) for key in needed if key in self.seen}
        by_sight: dict[int, list[ViewKey]] = {}
        for key in batch.views:
            by_sight.setdefault(key.sight, []).append(key)
        for keys in by_sight.values():
            places = [(row, row.views[view]) for row, view in (batch.views[key] for key in keys)]
            prompts = [(row.request.prompt, view.first + i) for row, view in places for i in range(view.tiles)]
            tiles = sent_together([prompt.tiles[tile] for prompt, tile in prompts], self.model.device)
            questions = [prompt.questions[tile] for prompt, tile in prompts if prompt.questions]
            windows = [view.window for _, view in places if view.window is not None]
            tokens = self.sight.through(places[0][0].adapter, tiles, questions, windows)
            for key, one in zip(keys, tokens.split([view.slots for _, view in places]), strict=True):
                visual[key] = one
                self.seen.put(key, one.clone())  # a view would keep the whole batch
        return visual

    def _embed(self, parts: Sequence[Part], visual: dict[ViewKey, Tensor]) -> Tensor:
        """(T, D), pictures in their slots."""
        device, told = self.model.device, []
        behind: list[tuple[int, int]] = []  # where ids go that the step before has drawn, and their places there
        for row, start, end in parts:
            told += row.tokens[start:end]
            if end > len(row.tokens):
                behind.append((len(told), row.place))
                told.append(0)
        ids = sent(torch.tensor(told), device)
        if behind:
            places, sources = sent(torch.tensor(behind).T.contiguous(), device)
            ids.index_copy_(0, places, self.drawn[0, sources])
        embeddings = self.model.language_model.embed(ids)
        at = 0
        for row, start, end in parts:
            for view in row.views_in(start, end):
                first, last = row.view_ranges[view]
                begin, stop = max(first, start), min(last, end)
                tokens = visual[row.view_key(view)][begin - first : stop - first]
                embeddings[at + begin - start : at + stop - start] = tokens.to(embeddings.dtype)
            at += end - start
        return embeddings

    def _angles(self, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
        """Positions (T,), and radians a position: (D / 2,) when all rows turn alike, else (T, D / 2)."""
        positions = sent(torch.cat([torch.arange(start, end) for _, start, end in parts]), self.model.device)
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
