"""The engine without its thread: rows come in, steps are run, pieces go out. Whoever calls `step` owns the model.

In: Rows.  Out: Pieces, to each row's on_piece.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from tessella.engine.answer import Answer
from tessella.engine.blocks import BlockBook
from tessella.engine.draw import Drawing
from tessella.engine.lora import Adapter, make_adapter
from tessella.engine.paged import BlockStore
from tessella.engine.request import EngineSettings, Finish, LowRank, OnPiece, Piece, Request
from tessella.engine.row import Row
from tessella.engine.runner import Runner
from tessella.engine.scheduler import Batch, Scheduler
from tessella.engine.sizes import fit
from tessella.engine.vision import VisionCache, views_of
from tessella.errors import ContextError, EngineError
from tessella.model.vision_language import VisionLanguageModel
from tessella.tokenizer import Tokenizer


class Core:
    """make_row may be called from any thread; everything else from one. Raises ConfigError for settings without room."""

    def __init__(self, model: VisionLanguageModel, tokenizer: Tokenizer, settings: EngineSettings):
        self.settings = settings
        self.model = model
        self.tokenizer = tokenizer
        sizes = fit(settings, model)
        self.block_tokens, self.most_tiles = sizes.block_tokens, sizes.batch_tiles
        self.longest_row = min(sizes.blocks * self.block_tokens, model.config.context_tokens)
        self.book = BlockBook(sizes.blocks)
        self.seen = VisionCache(settings.vision_cache_bytes)
        self.scheduler = Scheduler(
            self.book,
            self.seen,
            block_tokens=self.block_tokens,
            max_tokens=sizes.batch_tokens,
            max_tiles=sizes.batch_tiles,
            max_running=sizes.running,
        )
        store = BlockStore(model.config.language, sizes.blocks, self.block_tokens, model.device, model.dtype)
        self.runner = Runner(
            model,
            store,
            self.seen,
            settings=settings,
            most_rows=sizes.running,
            longest_row=self.longest_row,
        )
        self.runs_ahead = settings.run_ahead if settings.run_ahead is not None else model.device.type == "cuda"
        self._flying: Drawing | None = None  # of the step that was launched last
        self.live: dict[int, Row] = {}  # by number, from add to the last piece
        self.adapters: dict[str, Adapter] = {}
        self.steps = 0
        self.added = 0  # rows, since the start
        self.ended: dict[Finish, int] = {"stop": 0, "length": 0, "cancelled": 0, "error": 0}
        self.ended_waiting = 0  # rows that ended before they ever ran
        self.answer_tokens = 0
        self._adapters_made = 0

    def make_row(self, request: Request, on_piece: OnPiece) -> Row:
        """Raises ContextError for what can never fit, EngineError for an unknown adapter."""
        prompt, answer = len(request.prompt), request.params.max_tokens
        if prompt + answer > self.longest_row:
            way = f"ask for at most {self.longest_row - prompt:,}" if prompt < self.longest_row else "a shorter prompt"
            raise ContextError(
                f"{prompt:,} tokens and {answer:,} more for the answer; at most {self.longest_row:,} together: {way}"
            )
        config = self.model.config
        views = views_of(request.prompt, config.slots_per_tile)
        slots = sum(view.slots for view in views)
        assert prompt and int(request.prompt.slots.sum()) == slots, "slots and tiles differ in number"
        return Row(
            request,
            Answer(request, self.tokenizer),
            on_piece,
            None if request.adapter is None else self.adapter(request.adapter),
            block_tokens=self.block_tokens,
            views=views,
            unstretched_tokens=config.language.unstretched_tokens,
        )

    def add(self, row: Row) -> None:
        self.added += 1
        row.number = self.added
        self.live[row.number] = row
        self.scheduler.add(row)

    def enter_thread(self) -> None:
        """To be called once in the thread that will call `step`."""
        self.runner.enter_thread(self.most_tiles)

    @torch.inference_mode()
    def step(self) -> None:
        """Launch what can be run now, and give out what came of the step before it, or of this one when none is to run ahead.

        Running ahead, a row that has ended may be in the step that was launched meanwhile. What that step writes lies in blocks
        that were the row's; whoever has them now writes after it, since the device runs steps in order.
        """
        batch = self.scheduler.next_batch()
        launched = None if batch is None else self._launch(batch)
        flying, self._flying = self._flying, launched
        if flying is not None:
            self._land(flying)
        if launched is not None and not (self.runs_ahead and not any(row.waits_for_its_ids for row in launched.rows)):
            self._flying = None
            self._land(launched)

    def _launch(self, batch: Batch) -> Drawing | None:
        """None when no row draws."""
        drawing = batch.drawing
        outcome = self.runner.run(batch)
        self.scheduler.done(batch)
        self.steps += 1
        if outcome is None:
            return None
        launched = Drawing(drawing, outcome.logits, outcome.drawn)
        for place, row in enumerate(drawing):
            row.pending += 1
            row.place = place
        return launched

    def _land(self, flying: Drawing) -> None:
        """Wait for the ids of a step and give them out."""
        for row, drawn in zip(flying.rows, flying.land(), strict=True):
            row.pending -= 1
            if row.number not in self.live:
                continue  # it ended while this step ran
            piece = row.answer.take(drawn.id, drawn.logprob) if drawn.error is None else row.answer.end("error", drawn.error)
            self.answer_tokens += len(piece.ids)
            if piece.finish is None:
                row.tokens.append(drawn.id)
                row.on_piece(piece)
            else:
                self._leave(row, piece)

    def end(self, row: Row, finish: Finish, error: str | None = None) -> None:
        """End a row before its time, if it has not ended."""
        if row.number in self.live:
            self._leave(row, row.answer.end(finish, error))

    def end_all(self, finish: Finish, error: str | None = None) -> None:
        for row in list(self.live.values()):
            self.end(row, finish, error)

    def abandon(self, error: str) -> None:
        """Tell every row that is left that nothing comes any more; no step may follow."""
        for row in self.live.values():
            self.ended["error"] += 1
            row.on_piece(row.answer.end("error", error))
        self.live = {}

    def _leave(self, row: Row, piece: Piece) -> None:
        assert piece.finish is not None
        del self.live[row.number]
        self.scheduler.remove(row)
        self.ended_waiting += not row.was_admitted
        self.ended[piece.finish] += 1
        row.on_piece(piece)

    def adapter(self, name: str) -> Adapter:
        """Raises EngineError when there is none of that name."""
        adapter = self.adapters.get(name)
        if adapter is None:
            raise EngineError(f'no adapter "{name}" is loaded; there is {", ".join(self.adapters) or "none"}')
        return adapter

    @torch.inference_mode()
    def load_adapter(self, name: str, pairs: Mapping[str, LowRank], whole: Mapping[str, Tensor]) -> None:
        """Raises EngineError: see lora.make_adapter, or the name is taken."""
        if name in self.adapters:
            raise EngineError(f'an adapter "{name}" is loaded already; unload it first, or choose another name')
        adapter = make_adapter(self.model, name, self._adapters_made + 1, pairs, whole)
        self._adapters_made += 1
        self.adapters = {**self.adapters, name: adapter}  # another dict: make_row reads it in other threads

    def unload_adapter(self, name: str) -> None:
        """Rows that have it keep it. Raises EngineError for an unknown name."""
        adapter = self.adapter(name)
        self.adapters = {other: kept for other, kept in self.adapters.items() if other != name}
        self.seen.forget(adapter.number)
