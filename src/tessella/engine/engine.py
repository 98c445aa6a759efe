"""The engine: requests of many people in, pieces of answers out, from one model that one thread owns.

In: Requests, from any thread.  Out: Pieces, in the engine's thread, and an EngineState.
Whoever calls only leaves a message; between two steps the thread reads them, so a request joins and leaves within one step.
"""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import torch
from torch import Tensor

from tessella.engine.answer import Answer
from tessella.engine.blocks import BlockBook
from tessella.engine.draw import draw
from tessella.engine.lora import Adapter, make_adapter
from tessella.engine.paged import BlockStore
from tessella.engine.request import EngineSettings, EngineState, Finish, LowRank, OnPiece, Piece, Request
from tessella.engine.row import Row
from tessella.engine.runner import Runner
from tessella.engine.scheduler import Scheduler
from tessella.engine.sizes import fit
from tessella.engine.vision import VisionCache
from tessella.errors import ContextError, EngineError, QueueFull
from tessella.model.vision_language import VisionLanguageModel
from tessella.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Message:
    """Something to do in the engine's thread; done hears of the end, when somebody waits for it."""

    deed: Callable[[], None]
    done: "Future[None] | None" = None


class EngineTicket:
    """What submit gives back."""

    def __init__(self, cancel: Callable[[], None]):
        self.cancel = cancel


class Engine:
    """longest_row: tokens, prompt and params.max_tokens together, that one request may have at most.

    The model is the engine's from start to stop: nothing else may touch it. Answers are those of generate.py.
    Raises ConfigError for settings that leave no room for a single block.
    """

    def __init__(self, model: VisionLanguageModel, tokenizer: Tokenizer, settings: EngineSettings | None = None):
        self.settings = settings or EngineSettings()
        self.sizes = fit(self.settings, model)
        self._model = model
        self._tokenizer = tokenizer
        block_tokens = self.settings.block_tokens
        self.longest_row = min(self.sizes.blocks * block_tokens, model.config.context_tokens)
        self._book = BlockBook(self.sizes.blocks)
        self._seen = VisionCache(self.settings.vision_cache_bytes)
        store = BlockStore(model.config.language, self.sizes.blocks, block_tokens, model.device, model.dtype)
        self._runner = Runner(model, store, self._seen)
        self._scheduler = Scheduler(
            self._book,
            self._seen,
            block_tokens=block_tokens,
            max_tokens=self.sizes.batch_tokens,
            max_tiles=self.sizes.batch_tiles,
            max_running=self.sizes.running,
        )
        self._lock = threading.Lock()  # over what submit and stop decide together
        self._inbox: SimpleQueue[Message] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._open = False
        self._deadline: float | None = None  # of a drain, by time.monotonic
        self._failure: str | None = None
        self._live: dict[int, Row] = {}  # by number, from submit to the last piece
        self._adapters: dict[str, Adapter] = {}
        self._adapters_made = 0
        self._submitted = 0
        self._ended_waiting = 0  # rows that ended before they ever ran
        self._ended: dict[Finish, int] = {"stop": 0, "length": 0, "cancelled": 0, "error": 0}
        self._answer_tokens = 0
        self._steps = 0

    # ---- from any thread ----

    def start(self) -> None:
        """Once. Raises EngineError when the engine was started before."""
        with self._lock:
            if self._thread is not None:
                raise EngineError("this engine was started before; make another one")
            self._open = True
            self._thread = threading.Thread(target=self._run, name="tessella-engine", daemon=True)
        self._thread.start()

    def stop(self, drain: bool = True, seconds: float = 30.0) -> None:
        """Take nothing new; let what is here end for at most that long, then cancel the rest; return when the thread is over."""
        assert threading.current_thread() is not self._thread, "the engine's thread cannot wait for itself"
        with self._lock:
            was_open, self._open = self._open, False
        if was_open:
            deadline = time.monotonic() + (seconds if drain else 0.0)
            self._inbox.put(Message(lambda: self._set_deadline(deadline)))
        if self._thread is not None:
            self._thread.join()

    def submit(self, request: Request, on_piece: OnPiece) -> EngineTicket:
        """Returns at once. Raises QueueFull, ContextError for what can never fit, EngineError (unknown adapter, not running)."""
        self._check(request)
        adapter = self._adapter(request.adapter)
        config = self._model.config
        self._require_room()  # before any work is done for it
        row = Row(
            request,
            Answer(request, self._tokenizer),
            on_piece,
            adapter,
            block_tokens=self.settings.block_tokens,
            slots_per_tile=config.slots_per_tile,
            unstretched_tokens=config.language.unstretched_tokens,
        )
        with self._lock:
            self._require_room()
            self._submitted += 1
            row.number = self._submitted
            self._live[row.number] = row
            self._inbox.put(Message(lambda: self._scheduler.add(row)))
        return EngineTicket(lambda: self._inbox.put(Message(lambda: self._end(row, "cancelled"))))

    def state(self) -> EngineState:
        """What is under way and what has been done, at about one moment."""
        counters, ended = self._scheduler.counters, self._ended
        return EngineState(
            alive=self._thread is not None and self._thread.is_alive(),
            draining=self._deadline is not None,
            failure=self._failure,
            waiting=len(self._scheduler.waiting),
            running=len(self._scheduler.running),
            blocks=self._book.count,
            blocks_used=self._book.count - self._book.available,
            blocks_cached=self._book.idle,
            vision_bytes=self._seen.bytes,
            adapters=tuple(self._adapters),
            steps=self._steps,
            submitted=self._submitted,
            stopped=ended["stop"],
            length=ended["length"],
            cancelled=ended["cancelled"],
            failed=ended["error"],
            prompt_tokens=counters.prompt_tokens,
            cached_tokens=counters.cached_tokens,
            computed_tokens=counters.computed_tokens,
            answer_tokens=self._answer_tokens,
            preemptions=counters.preemptions,
            tiles=counters.tiles,
            tiles_cached=counters.tiles_cached,
        )

    def load_adapter(self, name: str, pairs: Mapping[str, LowRank], whole: Mapping[str, Tensor]) -> None:
        """Returns when requests may name it. Raises EngineError: see lora.make_adapter, or the name is taken."""
        self._call(lambda: self._load(name, pairs, whole))

    def unload_adapter(self, name: str) -> None:
        """Answers under way with it end in peace, new ones are refused. Raises EngineError for an unknown name."""
        self._call(lambda: self._unload(name))

    def _check(self, request: Request) -> None:
        prompt, answer = len(request.prompt), request.params.max_tokens
        if prompt + answer > self.longest_row:
            raise ContextError(
                f"{prompt:,} tokens and {answer:,} more for the answer; at most {self.longest_row:,} together: "
                + (f"ask for at most {self.longest_row - prompt:,}" if prompt < self.longest_row else "a shorter prompt")
            )
        assert prompt, "a prompt has tokens"
        slots = len(request.prompt.tiles) * self._model.config.slots_per_tile
        assert int(request.prompt.slots.sum()) == slots, "slots and tiles differ in number"

    def _adapter(self, name: str | None) -> Adapter | None:
        if name is None:
            return None
        adapter = self._adapters.get(name)
        if adapter is None:
            known = ", ".join(self._adapters) or "none"
            raise EngineError(f'no adapter "{name}" is loaded; there is {known}')
        return adapter

    def _require_room(self) -> None:
        self._require_open()
        waiting = self._submitted - self._scheduler.counters.admitted - self._ended_waiting
        if waiting >= self.settings.max_waiting:
            raise QueueFull(f"{waiting} requests wait; at most {self.settings.max_waiting}: try again later")

    def _require_open(self) -> None:
        if not self._open:
            raise EngineError(self._failure or "the engine does not run: it was not started, or it is being stopped")

    def _call(self, deed: Callable[[], None]) -> None:
        """Do it in the engine's thread and wait; before the start, do it here."""
        done: Future[None] = Future()
        with self._lock:
            if self._thread is None:
                return deed()
            self._require_open()
            self._inbox.put(Message(deed, done))
        done.result()

    # ---- in the engine's thread ----

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._deadline is None or self._live:
                    self._read_messages()
                    if self._deadline is not None and time.monotonic() >= self._deadline:
                        for row in list(self._live.values()):
                            self._end(row, "cancelled")
                    self._step()
            self._read_messages()
        except BaseException as error:
            self._failure = f"the engine broke down ({type(error).__name__}: {error}); start it again"
            raise
        finally:
            self._close()

    def _read_messages(self) -> None:
        """All that is there; with nothing to run, wait for the first."""
        wait = not self._live and self._deadline is None
        while True:
            try:
                message = self._inbox.get(block=wait)
            except Empty:
                return
            wait = False
            _obey(message)

    def _step(self) -> None:
        batch = self._scheduler.next_batch()
        if batch is None:
            return
        logits = self._runner.run(batch)
        self._scheduler.done(batch)
        self._steps += 1
        if logits is None:
            return
        for row, drawn in zip(batch.drawing, draw(batch.drawing, logits), strict=True):
            if drawn.error is not None:
                self._end(row, "error", drawn.error)
                continue
            piece = row.answer.take(drawn.id, drawn.logprob)
            self._answer_tokens += len(piece.ids)
            if piece.finish is None:
                row.tokens.append(drawn.id)
                row.on_piece(piece)
            else:
                self._leave(row, piece)

    def _end(self, row: Row, finish: Finish, error: str | None = None) -> None:
        """End a row before its time, if it has not ended."""
        if row.number in self._live:
            self._leave(row, row.answer.end(finish, error))

    def _leave(self, row: Row, piece: Piece) -> None:
        assert piece.finish is not None
        self._scheduler.remove(row)
        self._ended_waiting += not row.was_admitted
        self._ended[piece.finish] += 1
        del self._live[row.number]
        row.on_piece(piece)

    def _set_deadline(self, deadline: float) -> None:
        self._deadline = deadline

    def _load(self, name: str, pairs: Mapping[str, LowRank], whole: Mapping[str, Tensor]) -> None:
        if name in self._adapters:
            raise EngineError(f'an adapter "{name}" is loaded already; unload it first, or choose another name')
        adapter = make_adapter(self._model, name, self._adapters_made + 1, pairs, whole)
        self._adapters_made += 1
        self._adapters = {**self._adapters, name: adapter}  # another dict: submit reads it from other threads

    def _unload(self, name: str) -> None:
        adapter = self._adapter(name)
        assert adapter is not None
        self._adapters = {other: kept for other, kept in self._adapters.items() if other != name}
        self._seen.forget(adapter.number)

    def _close(self) -> None:
        """Nothing is taken any more, and nobody is left without an answer."""
        with self._lock:
            self._open = False
        error = self._failure or "the engine was stopped"
        while not self._inbox.empty():
            message = self._inbox.get()
            if message.done is not None:
                message.done.set_exception(EngineError(error))
        for row in list(self._live.values()):
            del self._live[row.number]
            self._ended["error"] += 1
            row.on_piece(row.answer.end("error", error))


def _obey(message: Message) -> None:
    """A fault in a deed that somebody waits for is told there; any other is the engine's own."""
    if message.done is None:
        message.deed()
        return
    try:
        message.deed()
    except EngineError as error:
        message.done.set_exception(error)
    else:
        message.done.set_result(None)
