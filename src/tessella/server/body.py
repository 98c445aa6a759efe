"""The body of a request, read under limits of bytes, of time, and of what all bodies together may hold.

In: a request, and a Lease that its bytes are counted on.  Out: its bytes, or a Refusal 408, 413, 415, 429.
"""

import asyncio

from starlette.requests import Request

from tessella.server.limits import Lease
from tessella.server.refusal import Refusal
from tessella.server.settings import Settings


async def read_whole(request: Request, settings: Settings, lease: Lease) -> bytes:
    """Raises Refusal 415 (not JSON, or packed), 413 (too large), 408 (too slow), 429 (no memory left), ClientDisconnect."""
    _check_headers(request, settings)
    parts: list[bytes] = []
    try:
        async with asyncio.timeout(settings.body_s):
            async for part in request.stream():
                if lease.held + len(part) > settings.body_bytes:
                    raise _too_large(settings)
                lease.take(len(part))
                parts.append(part)
    except TimeoutError as error:
        message = f"the body did not arrive within {settings.body_s:g} seconds; send it faster, or less"
        raise Refusal(408, message, code="body_timeout") from error
    return b"".join(parts)


def _check_headers(request: Request, settings: Settings) -> None:
    # A page of strangers can send text/plain without asking first, but not application/json.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, "the content-type must be application/json", code="content_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refusal(415, "packed bodies are not opened; send it without content-encoding", code="content_encoding")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > settings.body_bytes:
        raise _too_large(settings)


def _too_large(settings: Settings) -> Refusal:
    mib = settings.body_bytes / 2**20
    return Refusal(413, f"the body has more than {mib:g} MiB; send fewer or smaller pictures", code="body_too_large")
