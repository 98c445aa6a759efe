"""A model with routing tokens behind the same door as the engine: one answer after another, the plain way, then its decoders.

In: the engine's Requests.  Out: its Pieces; the last of an answer holds what its routing tokens gave.
The engine cannot run super-link queries, so such a model is slower to serve; what it cannot do here is refused by name.
"""

import base64
import io
import queue
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tessella.checkpoint.read import Loaded
from tessella.decode import Shown, decode_routed
from tessella.engine.answer import Answer
from tessella.engine.request import EngineState, Finish, LowRank, OnPiece, Piece, Request
from tessella.errors import EngineError, QueueFull, TessellaError
from tessella.generate import generate
from tessella.model.routing import Routed


@dataclass(eq=False)
class _Job:
    """One answer; what submit gives back."""

    request: Request
    on_piece: OnPiece
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


class PlainEngine:
    """Takes the engine's place for a routed model."""

    def __init__(self, loaded: Loaded, max_waiting: int):
        self.longest_row = loaded.inputs.context_tokens
        self._loaded, self._max_waiting = loaded, max_waiting
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="tessella-plain", daemon=True)
        self._ended: Counter[Finish] = Counter()
        self._submitted = self._answer_tokens = self._prompt_tokens = self._tiles = 0
        self._running: _Job | None = None
        self._open = False
        self._failure: str | None = None

    def start(self) -> None:
        self._open = True
        self._thread.start()

    def stop(self, drain: bool = True, seconds: float = 30.0) -> None:
        """Take nothing new; what runs may end for that long."""
        self._open = False
        self._jobs.put(None)
        self._thread.join(seconds if drain else 0.0)
        if self._running is not None:
            self._running.cancel()
            self._thread.join()

    def submit(self, request: Request, on_piece: OnPiece) -> _Job:
        """Raises QueueFull, EngineError for what cannot be done beside super-link queries."""
        if not self._open:
            raise EngineError(self._failure or "the server is being stopped")
        if self._jobs.qsize() >= self._max_waiting:
            raise QueueFull(f"{self._jobs.qsize()} requests wait; at most {self._max_waiting}: try again later")
        asked = {"adapters": request.adapter, "response_format": request.mask, "logprobs": request.logprobs}
        extra = [name for name, value in asked.items() if value is not None]
        if extra:
            raise EngineError(f"a model with routing tokens is served without {' and '.join(extra)}; leave it out")
        job = _Job(request, on_piece)
        self._submitted += 1
        self._jobs.put(job)
        return job

    def load_adapter(self, name: str, pairs: Mapping[str, LowRank], whole: Mapping[str, Tensor]) -> None:
        raise EngineError(f"adapter {name}: a model with routing tokens is served alone; convert the adapter into a model first")

    def unload_adapter(self, name: str) -> None:
        raise EngineError(f"there is no adapter {name}")

    def state(self) -> EngineState:
        """What is under way; there are no cache blocks."""
        return EngineState(
            alive=self._thread.is_alive(), draining=not self._open, failure=self._failure, waiting=self._jobs.qsize(),
            running=int(self._running is not None), blocks=0, blocks_used=0, blocks_cached=0, vision_bytes=0, adapters=(),
            submitted=self._submitted, stopped=self._ended["stop"], length=self._ended["length"],
            cancelled=self._ended["cancelled"], failed=self._ended["error"], prompt_tokens=self._prompt_tokens,
            answer_tokens=self._answer_tokens, tiles=self._tiles,
        )  # fmt: skip

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._running = job
            try:
                self._answer(job)
            except BaseException as error:
                self._failure = f"the model broke down ({type(error).__name__}: {error}); start the server again"
                self._open = False
                job.on_piece(Piece(finish="error", error=self._failure))
                raise
            finally:
                self._running = None

    def _answer(self, job: _Job) -> None:
        """All pieces of one answer. An error that a person can mend ends this one answer alone."""
        answer, loaded = Answer(job.request, self._loaded.tokenizer), self._loaded
        prompt, params = job.request.prompt, job.request.params
        routed: list[Routed] = []
        last: Piece | None = None
        try:
            for token in generate(loaded.model, prompt, params, job.request.stop_ids, routed.append):
                piece = answer.take(token, None)
                if job.cancelled:
                    last = answer.end("cancelled")
                elif piece.finish is not None:
                    last = piece
                if last is not None:
                    break
                job.on_piece(piece)
            if last is None:
                last = answer.end("length" if self._full(answer.ids, routed, params.max_tokens) else "stop")
            shown = decode_routed(loaded.model, loaded.tokenizer, prompt, answer.ids, routed, seed=params.seed or 0)
            last = replace(last, shown=tuple(as_sent(one) for one in shown))
        except TessellaError as error:
            last = answer.end("error", str(error))
        assert last.finish is not None
        self._ended[last.finish] += 1
        self._answer_tokens += len(answer.ids)
        self._prompt_tokens += len(prompt)
        self._tiles += len(prompt.tiles)
        job.on_piece(last)

    def _full(self, ids: list[int], routed: list[Routed], most: int) -> bool:
        """Whether an answer ended for want of room, its super-link queries counted."""
        last = self._loaded.tokenizer.routes.of(ids[-1]) if ids else None
        unheard = last is not None and (not routed or routed[-1].said != len(ids))
        return unheard or len(ids) + sum(one.route.queries for one in routed) >= most


def as_sent(shown: Shown) -> dict[str, Any]:
    """What a client gets for one routing token: docs/boxes.md; a picture is a data: address."""
    sent = shown.as_json()
    if shown.picture is not None:
        stream = io.BytesIO()
        shown.picture.save(stream, "PNG")
        sent["picture"] = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    return sent
