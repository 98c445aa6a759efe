"""The door: what is checked of a request before any of its body is read, and the headers that every response bears.

In: an ASGI request.  Out: the same, passed on with who asks (scope["state"]["client"]); or a refusal.
In this order: host and origin (a web page must not reach a server on its visitor's machine), key, rate, how many at once.
"""

import asyncio
import ipaddress
import secrets
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tessella.server.keys import Keys
from tessella.server.limits import AtOnce, Rate
from tessella.server.metrics import Metrics
from tessella.server.refusal import Refusal
from tessella.server.settings import LOOPBACK_NAMES, Settings

OPEN = ("/health", "/ready", "/docs", "/openapi.json")  # without a key: they tell nothing of anybody
MOST_HEADERS = 100
ADMIN = "/v1/adapters"
HEADERS = {"x-content-type-options": "nosniff", "cache-control": "no-store", "referrer-policy": "no-referrer"}
ALLOWED_HEADERS = "authorization, content-type"


class Door:
    """ASGI middleware. draining tells whether new questions are to be refused."""

    def __init__(self, app: ASGIApp, settings: Settings, draining: Callable[[], bool], metrics: Metrics):
        self.app = app
        self.settings = settings
        self.draining = draining
        self.metrics = metrics
        self.keys = Keys(settings.keys)
        self.admin_keys = Keys([settings.admin_key] if settings.admin_key else [])
        self.rate = Rate(settings.client_per_minute)
        self.at_once = AtOnce(settings.requests_at_once, settings.client_at_once)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        extra = {**HEADERS, "x-request-id": secrets.token_hex(8)}
        scope.setdefault("state", {})["request_id"] = extra["x-request-id"]

        begun = False

        async def send_with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self.metrics.answered(scope["path"], message["status"])
                MutableHeaders(scope=message).update(extra)
            await send(message)

        try:
            self._check_size(scope)
            self._check_host(headers)
            extra |= self._check_origin(headers)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await Response(status_code=204, headers=_preflight(scope["path"]))(scope, receive, send_with_headers)
                return
            if scope["path"] in OPEN:
                await self.app(scope, receive, send_with_headers)
                return
            client = self._who(scope, headers)
            scope["state"]["client"] = client
            if scope["method"] == "POST" and self.draining():
                raise Refusal(503, "the server is stopping and takes nothing new", code="draining", retry_s=5)
            self.rate.take(client)
            with self.at_once.held(client):
                await self.app(scope, receive, send_with_headers)
        except Refusal as refusal:
            self.metrics.refused(refusal)
            await refusal.response()(scope, receive, send_with_headers)
        except asyncio.CancelledError:
            if begun or not self.draining():
                raise
            # The server's last act for a body that was still arriving; its own answer would be a bare 500.
            late = Refusal(503, "the server is stopping, and the request was not whole in time", code="draining", retry_s=5)
            self.metrics.refused(late)
            await late.response()(scope, receive, send_with_headers)

    def _check_size(self, scope: Scope) -> None:
        """What came in one piece was not measured by h11, which only bounds what it keeps."""
        size = (
            len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(name) + len(value) for name, value in scope["headers"])
        )
        if size > self.settings.head_bytes or len(scope["headers"]) > MOST_HEADERS:
            limit = f"{self.settings.head_bytes:,} bytes and {MOST_HEADERS} headers"
            raise Refusal(431, f"the head has more than {limit}; send less", code="head_too_large")

    def _check_host(self, headers: Headers) -> None:
        """A keyless server on this machine answers only to names of this machine: a name that strangers own may point here."""
        settings = self.settings
        if settings.keys or not settings.on_loopback:
            return
        host = _host_name(headers.get("host", ""))
        if host not in (*LOOPBACK_NAMES, settings.host, *settings.allowed_hosts):
            raise Refusal(403, "this server is not known by that Host; --allow-host NAME makes it so", code="unknown_host")

    def _check_origin(self, headers: Headers) -> dict[str, str]:
        """The CORS headers for a page that may ask. Raises Refusal 403 for any other page."""
        origin = headers.get("origin")
        if origin is None:
            return {}
        if origin in self.settings.cors_origins:
            return {"access-control-allow-origin": origin, "vary": "Origin"}
        if urlsplit(origin).netloc != headers.get("host"):
            raise Refusal(403, "web pages of that origin may not ask; --cors-origin ORIGIN lets them", code="unknown_origin")
        return {}

    def _who(self, scope: Scope, headers: Headers) -> str:
        """The client, for the limits: its key and its address. Raises Refusal 401, 403."""
        header = headers.get("authorization", "").encode("latin-1")
        address = network_of(scope["client"][0] if scope.get("client") else "")
        if scope["path"] == ADMIN or scope["path"].startswith(f"{ADMIN}/"):
            if not len(self.admin_keys):
                raise Refusal(
                    403, "this server has no admin key, so adapters stay as they are; start it with one", code="no_admin"
                )
            self.admin_keys.check(header)
            return f"admin@{address}"
        number = self.keys.check(header) if len(self.keys) else 0
        return f"{number}@{address}"


def network_of(address: str) -> str:
    """The address, or of IPv6 its /64, which one person may have whole."""
    try:
        known = ipaddress.ip_address(address)
    except ValueError:
        return address  # a unix socket, or a test
    if isinstance(known, ipaddress.IPv6Address) and known.ipv4_mapped is None:
        return str(ipaddress.IPv6Network((known, 64), strict=False))
    return str(known)


def _host_name(host: str) -> str:
    """Of a Host header, without the port: [::1]:8000 -> ::1."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()


def _preflight(path: str) -> dict[str, str]:
    methods = "GET, POST, DELETE" if path.startswith(ADMIN) else "GET, POST"
    return {
        "access-control-allow-methods": methods,
        "access-control-allow-headers": ALLOWED_HEADERS,
        "access-control-max-age": "600",
    }
