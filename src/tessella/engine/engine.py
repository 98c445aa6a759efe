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

from torch import Tensor

from tessella.engine.core import Core
from tessella.engine.request import EngineSettings, EngineState, LowRank, OnPiece, Request
from tessella.errors import ConfigError, EngineError, QueueFull, TessellaError
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
    """The model is the engine's from start to stop: nothing else may touch it. Greedy answers are those of generate.py.

    longest_row: tokens, prompt and params.max_tokens together, that one request may have at most.
    Raises ConfigError for settings that leave no room for a single block.
    """

    def __init__(self, model: VisionLanguageModel, tokenizer: Tokenizer, settings: EngineSettings | None = None):
        if model.routing is not None:
            raise ConfigError(
                "the engine does not run the super-link queries behind routing tokens, and this model has them; ask it with "
                "tessella chat, or move its routing/ folder away to serve its text alone"
            )
        self._core = Core(model, tokenizer, settings or EngineSettings())
        self.longest_row = self._core.longest_row
        self._lock = threading.Lock()  # over what submit and stop decide together
        self._inbox: SimpleQueue[Message] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._open = False
        self._submitted = 0
        self._deadline: float | None = None  # of a drain, by time.monotonic
        self._failure: str | None = None

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
        self._require_room()  # before any work is done for it
        row = self._core.make_row(request, on_piece)
        with self._lock:
            self._require_room()
            self._submitted += 1
            self._inbox.put(Message(lambda: self._core.add(row)))
        return EngineTicket(lambda: self._inbox.put(Message(lambda: self._core.end(row, "cancelled"))))

    def load_adapter(self, name: str, pairs: Mapping[str, LowRank], whole: Mapping[str, Tensor]) -> None:
        """Returns when requests may name it. Raises EngineError: see lora.make_adapter, or the name is taken."""
        self._call(lambda: self._core.load_adapter(name, pairs, whole))

    def unload_adapter(self, name: str) -> None:
        """Answers under way with it end in peace, new ones are refused. Raises EngineError for an unknown name."""
        self._call(lambda: self._core.unload_adapter(name))

    def state(self) -> EngineState:
        """What is under way and what has been done, at about one moment."""
        core, counters = self._core, self._core.scheduler.counters
        return EngineState(
            alive=self._thread is not None and self._thread.is_alive(),
            draining=self._thread is not None and not self._open,
            failure=self._failure,
            waiting=self._submitted - core.added + len(core.scheduler.waiting),
            running=len(core.scheduler.running),
            blocks=core.book.count,
            blocks_used=core.book.count - core.book.available,
            blocks_cached=core.book.idle,
            vision_bytes=core.seen.bytes,
            adapters=tuple(core.adapters),
            steps=core.steps,
            submitted=self._submitted,
            stopped=core.ended["stop"],
            length=core.ended["length"],
            cancelled=core.ended["cancelled"],
            failed=core.ended["error"],
            prompt_tokens=counters.prompt_tokens,
            cached_tokens=counters.cached_tokens,
            computed_tokens=counters.computed_tokens,
            answer_tokens=core.answer_tokens,
            preemptions=counters.preemptions,
            tiles=counters.tiles,
            tiles_cached=counters.tiles_cached,
        )

    def _require_room(self) -> None:
        """A row that was put back does not count: only those who never ran wait in the queue."""
        self._require_open()
        most = self._core.settings.max_waiting
        waiting = self._submitted - self._core.scheduler.counters.admitted - self._core.ended_waiting
        if waiting >= most:
            raise QueueFull(f"{waiting} requests wait; at most {most}: try again later")

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

    # Everything below runs in the engine's thread.

    def _run(self) -> None:
        try:
            self._core.enter_thread()
            while self._deadline is None or self._core.live:
                self._read_messages()
                if self._deadline is not None and time.monotonic() >= self._deadline:
                    self._core.end_all("cancelled")
                self._core.step()
        except BaseException as error:
            self._failure = f"the engine broke down ({type(error).__name__}: {error}); start it again"
            raise
        finally:
            self._close()

    def _read_messages(self) -> None:
        """All that is there; with nothing to run, wait for the first."""
        wait = not self._core.live and self._deadline is None
        while True:
            try:
                message = self._inbox.get(block=wait)
            except Empty:
                return
            wait = False
            _obey(message)

    def _set_deadline(self, deadline: float) -> None:
        self._deadline = deadline

    def _close(self) -> None:
        """Nothing is taken any more, and nobody is left without an answer."""
        with self._lock:
            self._open = False
        error = self._failure or "the engine was stopped"
        while not self._inbox.empty():
            message = self._inbox.get()
            if message.done is None:
                message.deed()  # a row that came, or one that is cancelled
            else:
                message.done.set_exception(EngineError(error))
        self._core.abandon(error)
        self._core.runner.leave()


def _obey(message: Message) -> None:
    """A fault in a deed that somebody waits for is told there; any other is the engine's own."""
    if message.done is None:
        message.deed()
        return
    try:
        message.deed()
    except TessellaError as error:
        message.done.set_exception(error)
    except BaseException as error:
        message.done.set_exception(error)  # who waits must not wait for ever
        raise
    else:
        message.done.set_result(None)
