"""The door of the web chat: who may come in, what the page may load, how it ends.

In: Options.  Out: a page that is served until Ctrl-C or SIGTERM. Closed by default: this machine alone, no tunnel, no telemetry.
"""

import os
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tessella.errors import ConfigError
from tessella.ui.client import Server
from tessella.ui.shelf import Row

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported, which is below for that reason

import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tessella.ui.page import HERE, build

USER = "tessella"
KEPT_S = 86_400.0  # a picture that was shown
LARGEST_UPLOAD = "20mb"  # what the server takes of one picture
FONTS = (
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "Noto Sans",
    "Noto Sans CJK SC",
    "PingFang SC",
    "Microsoft YaHei",
    "sans-serif",
)
LOOPBACK = ("localhost", "127.0.0.1", "::1")

# The page loads nothing from elsewhere, whatever a model says; Gradio's own scripts need inline and eval.
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src 'self' blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "frame-ancestors 'none'",
        "base-uri 'self'",
        "form-action 'self'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
}


@dataclass(frozen=True)
class Options:
    """What `tessella ui` was told."""

    servers: tuple[Server, ...]
    rows: Sequence[Row]  # of the quick bar, at least one
    host: str = "127.0.0.1"
    port: int | None = None  # None: the first free one from 7860
    password: str | None = None  # None: none on this machine, a fresh one on any other address
    allowed_hosts: tuple[str, ...] = ()  # names by which a reverse proxy calls us
    compare: tuple[str, ...] | None = None  # names of two models to open with, side by side; (): the first two; None: one
    share: bool = False
    open: bool = True

    def __post_init__(self) -> None:
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}, must be in [1, 65535]; leave it out to take a free one")
        if self.password is not None and len(self.password) < 8:
            raise ConfigError(f"the password has {len(self.password)} characters, must have at least 8")

    @property
    def closed(self) -> bool:
        """Whether this machine alone can reach the page."""
        return not self.share and is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """A name is not looked up: only localhost is known to be this machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Door:
    """Refuses a request that calls us by a strange name, and puts HEADERS on every answer.

    A strange name is how a page from elsewhere would reach this machine's own address (DNS rebinding). hosts: (): any name.
    """

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...]):
        self.app = app
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((name.encode(), text.encode()) for name, text in HEADERS.items())]
            await send(message)

        if scope["type"] == "http" and self.hosts:
            named = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            if urlsplit(f"//{named}").hostname not in self.hosts:
                refusal = PlainTextResponse("This page is not known by that name; tessella ui --allowed-host NAME adds one.", 400)
                await refusal(scope, receive, send_with_headers)
                return
        await self.app(scope, receive, send_with_headers)


def serve(options: Options, ready: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C or SIGTERM; ready is told its address. Pictures that were shown are deleted at the end.

    Raises ConfigError when the port is taken, or when a tunnel was asked for and not confirmed.
    """
    if options.share:
        confirm_tunnel()
    password = options.password or (None if options.closed else secrets.token_urlsafe(16))
    with tempfile.TemporaryDirectory(prefix="tessella-ui-") as place:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(place) / "uploads")
        _ask_itself_directly()
        folder = Path(place) / "shown"
        folder.mkdir()
        blocks = build(options.servers, options.rows, folder, options.compare)
        address = open_page(blocks, options, password, folder)
        if password and not options.password:
            print(f"user {USER}, password {password}", file=sys.stderr)
        ready(address)
        try:
            _wait(folder)
        finally:
            blocks.close(verbose=False)


def confirm_tunnel() -> None:
    """Raises ConfigError unless a person at a terminal says yes."""
    if not sys.stdin.isatty():
        raise ConfigError(
            "--share opens the page to the internet and asks first, and there is no terminal to ask in; leave it out"
        )
    print("--share sends the page, and all that is shown and said, through a tunnel of Gradio's company.", file=sys.stderr)
    if input("Whoever has link and password can use it. Type yes to open it: ").strip().lower() != "yes":
        raise ConfigError("not shared; without --share the page stays on this machine")


def _ask_itself_directly() -> None:
    """Gradio asks itself whether it is up; a proxy of the environment is no way to this machine."""
    for name in ("NO_PROXY", "no_proxy"):
        known = os.environ.get(name, "")
        os.environ[name] = ",".join(part for part in (known, "localhost,127.0.0.1,::1") if part)


def open_page(blocks: gr.Blocks, options: Options, password: str | None, folder: Path) -> str:
    """Serve the page in a thread of its own; gives its address. Raises ConfigError when the port is taken."""
    hosts = (*LOOPBACK, options.host, *options.allowed_hosts) if options.closed else ()
    theme = gr.themes.Base(primary_hue="teal", secondary_hue="teal", font=FONTS, font_mono=("ui-monospace", "monospace"))
    # Gradio's grey on white is too faint to be read by all (WCAG AA wants 4.5 to 1).
    theme.set(body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300")
    theme.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")
    common: dict[str, Any] = {"prevent_thread_lock": True, "quiet": True, "footer_links": [], "run_history": False}
    closed: dict[str, Any] = {
        "enable_monitoring": False,
        "ssr_mode": False,
        "mcp_server": False,
        "pwa": False,
        "strict_cors": True,
    }
    try:
        _, address, public = blocks.launch(
            server_name=options.host,
            server_port=options.port,
            share=options.share,
            auth=(USER, password) if password else None,
            max_file_size=LARGEST_UPLOAD,
            allowed_paths=[str(folder)],
            app_kwargs={"middleware": [Middleware(Door, hosts=hosts)]},
            theme=theme,
            css_paths=HERE / "page.css",
            inbrowser=options.open and options.closed,
            **common,
            **closed,
        )
    except OSError as error:
        raise ConfigError(
            f"port {options.port or '7860 and the next hundred'} of {options.host} cannot be had ({error}); give another --port"
        ) from error
    return str(public or address)


def _wait(folder: Path) -> None:
    """Until Ctrl-C or SIGTERM; meanwhile copies of pictures that are a day old are deleted, as Gradio does with uploads."""
    ended = threading.Event()
    before = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not ended.wait(3600):
            for path in folder.rglob("*.*"):
                if time.time() - path.stat().st_mtime > KEPT_S:
                    path.unlink()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
