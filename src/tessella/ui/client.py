"""The way to the server: OpenAI's interface over HTTP, nothing else.

In: an address and a request.  Out: its models; an answer in pieces; or a Trouble that says what to do.
"""

import asyncio
import ipaddress
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2

from tessella.errors import ConfigError
from tessella.ui.trouble import Trouble

CONNECT_S = 5.0
SILENCE_S = 300.0  # a long prompt on a busy CPU says nothing for minutes


@dataclass(frozen=True)
class Server:
    """One server. The key stays here: the browser never sees it."""

    url: str  # http://127.0.0.1:8000, without /v1
    key: str | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ConfigError(f'"{self.url}" is no address of a server; it looks like http://127.0.0.1:8000')

    async def models(self) -> list[str]:
        """Names that can be asked: base models and adapters. Raises Trouble."""
        async with self._ask("GET", "models", None, CONNECT_S) as response:
            try:
                data = json.loads(await response.aread())
                return [str(row["id"]) for row in data["data"]]
            except (ValueError, KeyError, TypeError) as error:
                raise Trouble("odd", url=self.url, message="/v1/models lists no models") from error

    async def pieces(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a streamed chat completion. Raises Trouble; what came before stays true."""
        async with self._ask("POST", "chat/completions", request, SILENCE_S) as response:
            ended = False
            async for event in _events(response):
                if event == "[DONE]":
                    ended = True
                    continue
                chunk = json.loads(event)
                if "error" in chunk:
                    raise _refusal(response.status_code, chunk)
                yield chunk
            if not ended:
                raise Trouble("cut")

    @asynccontextmanager
    async def _ask(self, method: str, path: str, body: dict[str, Any] | None, silence_s: float) -> AsyncIterator[httpx2.Response]:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        timeout = httpx2.Timeout(silence_s, connect=CONNECT_S)
        started = False
        try:
            # A proxy of the environment is no way to this machine itself.
            async with httpx2.AsyncClient(timeout=timeout, trust_env=not _is_here(self.url)) as client:
                address = f"{self.url.rstrip('/')}/v1/{path}"
                async with client.stream(method, address, json=body, headers=headers) as response:
                    if response.status_code != 200:
                        raise _refusal(response.status_code, _json_or_nothing(await response.aread()))
                    started = True
                    yield response
        except httpx2.ReadTimeout as error:
            raise Trouble("slow", seconds=f"{silence_s:.0f}") from error
        except (httpx2.TransportError, json.JSONDecodeError) as error:
            raise Trouble("cut") if started and body else Trouble("away", url=self.url) from error


def _is_here(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _events(response: httpx2.Response) -> AsyncIterator[str]:
    """The data of server-sent events. Split at newlines alone: httpx2's own lines end at U+2028 too, which an answer may hold."""
    rest = b""
    async for some in response.aiter_bytes():
        *lines, rest = (rest + some).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip().decode("utf-8")


def _json_or_nothing(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _refusal(status: int, body: dict[str, Any]) -> Trouble:
    """The server's own sentence, in OpenAI's form; what has none is told by its status."""
    error = body.get("error")
    message = error.get("message") if isinstance(error, dict) else error
    return Trouble("refused", status=str(status), message=str(message or httpx2.codes.get_reason_phrase(status)))


@dataclass(frozen=True)
class Choice:
    """A model that can be asked, and where. label: what the page shows; with its server where there are several."""

    label: str
    model: str
    server: Server


async def choices(servers: tuple[Server, ...]) -> tuple[list[Choice], list[Trouble]]:
    """Every model of every server, and what is wrong with those that did not answer."""
    found: list[Choice] = []
    troubles: list[Trouble] = []
    answers = await asyncio.gather(*(server.models() for server in servers), return_exceptions=True)
    for server, answer in zip(servers, answers, strict=True):
        if isinstance(answer, Trouble):
            troubles.append(answer)
        elif isinstance(answer, BaseException):
            raise answer
        else:
            where = f" @ {urlsplit(server.url).netloc}" if len(servers) > 1 else ""
            found += [Choice(f"{model}{where}", model, server) for model in answer]
    return found, troubles
