"""From the engine's thread to a client: pieces are carried over, joined where several wait, and sent as they come.

In: the Pieces of one request's answers.  Out: whole answers, or server-sent events.
A client that goes away is noticed by its connection, not by the next write, and its answers are cancelled.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tessella.engine.request import Piece, Ticket
from tessella.server.refusal import Refusal
from tessella.server.replies import END

QUIET_S = 15.0
Result = TypeVar("Result")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Mailbox:
    """One for all requests: the engine's thread puts pieces in, and wakes the event loop once for however many there are."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._lock = threading.Lock()
        self._waiting: list[tuple[Running, int, Piece]] = []

    def put(self, running: "Running", index: int, piece: Piece) -> None:
        """Called in the engine's thread."""
        with self._lock:
            self._waiting.append((running, index, piece))
            first = len(self._waiting) == 1
        if first and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for running, index, piece in waiting:
            running.arrived(index, piece)


class Submit(Protocol):
    def __call__(self, index: int, on_piece: Callable[[Piece], None]) -> Ticket: ...


class Running:
    """The answers to one request, under way. Ended by an error of any of them."""

    def __init__(self, mailbox: Mailbox, count: int):
        self._mailbox = mailbox
        self._pieces: deque[tuple[int, Piece]] = deque()
        self._news = asyncio.Event()
        self._tickets: list[Ticket] = []
        self.left = count

    def start(self, submit: Submit) -> None:
        """Submits all answers; when one is refused the others are cancelled, and the error goes on to the caller."""
        try:
            for index in range(self.left):
                self._tickets.append(submit(index, lambda piece, index=index: self._mailbox.put(self, index, piece)))  # type: ignore[misc]
        except BaseException:
            self.cancel()
            raise

    def arrived(self, index: int, piece: Piece) -> None:
        self._pieces.append((index, piece))
        self._news.set()

    def cancel(self) -> None:
        for ticket in self._tickets:
            ticket.cancel()

    async def parts(self) -> AsyncIterator[tuple[int, Piece] | None]:
        """(number of the answer, what is new of it), until all have ended; None whenever nothing was new for QUIET_S.

        Raises Refusal 500 or 503 when one ends with an error.
        """
        while self.left:
            try:
                async with asyncio.timeout(QUIET_S):
                    await self._news.wait()
            except TimeoutError:
                yield None
                continue
            self._news.clear()
            pieces, self._pieces = self._pieces, deque()
            for index, piece in joined(pieces):
                if piece.finish in ("error", "cancelled"):
                    raise _broken_off(piece)
                self.left -= piece.finish is not None
                yield index, piece


def joined(pieces: Iterable[tuple[int, Piece]]) -> list[tuple[int, Piece]]:
    """The pieces of each answer as one, answers in the order of their first piece."""
    by_answer: dict[int, list[Piece]] = {}
    for index, piece in pieces:
        by_answer.setdefault(index, []).append(piece)
    return [(index, join(some)) for index, some in by_answer.items()]


def join(pieces: Sequence[Piece]) -> Piece:
    if len(pieces) == 1:
        return pieces[0]
    return Piece(
        text="".join(piece.text for piece in pieces),
        ids=tuple(token for piece in pieces for token in piece.ids),
        logprobs=tuple(one for piece in pieces for one in piece.logprobs),
        finish=pieces[-1].finish,
        error=pieces[-1].error,
        usage=pieces[-1].usage,
        shown=pieces[-1].shown,
    )


def _broken_off(piece: Piece) -> Refusal:
    if piece.finish == "cancelled":
        return Refusal(503, "the answer was broken off: the server is stopping", code="draining", retry_s=5)
    return Refusal(500, piece.error or "the answer could not be finished", code="answer_failed")


async def while_client_waits(receive: Receive, work: Coroutine[Any, Any, Result], limit_s: float) -> Result:
    """Runs work to its end; cancels it when the client goes away (ClientGone) or the time is over (Refusal 408)."""
    gone = asyncio.create_task(_until_gone(receive))
    task = asyncio.create_task(work)
    try:
        await asyncio.wait((task, gone), timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ClientGone
        raise Refusal(408, f"the answer took longer than {limit_s:g} seconds; ask for fewer tokens", code="time_limit")
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Events while they come, then END; a failure on the way is an event of its own, since the status is out by then.

    ended is told how it ended: None, the Refusal that was sent, or ClientGone.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], limit_s: float, ended: Callable[[Exception | None], None]):
        super().__init__(headers={"x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.events = events
        self.limit_s = limit_s
        self.ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        told: Exception | None = None
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await while_client_waits(receive, self._send_all(send), self.limit_s)
        except ClientGone as gone:
            told = gone
        except Refusal as refusal:
            told = refusal
            await _send(send, b"data: %b\n\n" % refusal.body.model_dump_json().encode())
        finally:
            self.ended(told)
        if not isinstance(told, ClientGone):
            await send({"type": "http.response.body", "body": b"" if told else END, "more_body": False})

    async def _send_all(self, send: Send) -> None:
        async for data in self.events:
            await _send(send, data)


def _send(send: Send, data: bytes) -> Awaitable[None]:
    return send({"type": "http.response.body", "body": data, "more_body": True})
