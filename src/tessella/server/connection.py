"""One connection: uvicorn's, with the time limits that it lacks.

A head must arrive within head_s (slow-loris), what a client leaves unread for write_s ends the connection, and after an answer
that came before the whole body, the rest of the body is passed over for a few seconds only. Too many connections are closed.
"""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from tessella.server.refusal import Refusal
from tessella.server.settings import Settings

LINGER_S = 5.0


class Connection(H11Protocol):
    """settings is set by connection_class."""

    settings: Settings

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.settings.connections:
            transport.abort()
            return
        self._head_timer = self.loop.call_later(self.settings.head_s, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._write_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._head_timer is None and self.conn.their_state is h11.IDLE:
            self._head_timer = self.loop.call_later(self.settings.head_s, self._head_is_late)
        super().data_received(data)
        if self._head_timer is not None and self.conn.their_state is not h11.IDLE:
            self._head_timer.cancel()
            self._head_timer = None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
            self._linger_timer = self.loop.call_later(LINGER_S, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.settings.write_s, self.transport.abort)

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def _head_is_late(self) -> None:
        if not self.transport.is_closing():
            limit = self.settings.head_s
            self._refuse(Refusal(408, f"the head did not arrive within {limit:g} seconds; send it faster", code="head_timeout"))

    def send_400_response(self, msg: str) -> None:
        self._refuse(Refusal(400, "that is no HTTP request that we can read, or its head is too large", code="bad_request"))

    def _refuse(self, refusal: Refusal) -> None:
        """Says so where a response can still be sent, and closes."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = refusal.response({"connection": "close"})
            head = h11.Response(status_code=refusal.status, headers=response.raw_headers, reason=b"")
            for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def connection_class(settings: Settings) -> type[Connection]:
    """uvicorn makes the connections itself, and passes nothing on."""
    return type("ConnectionOfServer", (Connection,), {"settings": settings})
