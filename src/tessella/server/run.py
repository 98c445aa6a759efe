"""The server's life: it listens, serves, drains on SIGTERM or Ctrl-C, and stops.

In: an engine that runs, inputs, Settings.  Out: why it stopped.
"""

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Literal

import uvicorn

from tessella.errors import ConfigError
from tessella.inputs import Inputs
from tessella.server.app import create_app
from tessella.server.connection import connection_class
from tessella.server.memory import Tidy, give_back, settle
from tessella.server.service import Engine, Service
from tessella.server.settings import Settings

Stopped = Literal["asked", "engine"]
STEP_S = 0.1
log = logging.getLogger("tessella.server")


def serve(
    engine: Engine,
    inputs: Inputs,
    settings: Settings,
    load_adapter: Callable[[str, Path], None],
    taken: socket.socket,
    started: Callable[[], None] = lambda: None,
    access_log: bool = False,
) -> Stopped:
    """Serves on the address that was taken, until told to stop or the engine has failed. started: called once it listens."""

    async def run() -> Stopped:
        server = Server(Service(engine, inputs, settings, load_adapter), access_log, started)
        settle()
        await server.serve([taken])
        return server.why

    return asyncio.run(run())


def take_address(settings: Settings) -> socket.socket:
    """Bound, not listening yet: so a port that is taken is told before the model is loaded, and nobody waits meanwhile.

    Raises ConfigError.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # TCP by name: asyncio sends small pieces at once (TCP_NODELAY) only on sockets that say so; else each waits 40 ms.
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that was killed may be started again at once
    try:
        made.bind((settings.host, settings.port))
    except OSError as error:
        made.close()
        message = (
            f"{settings.host}:{settings.port} cannot be taken ({error.strerror}); another --port, or --port 0 for a free one"
        )
        raise ConfigError(message) from error
    return made


class Server(uvicorn.Server):
    """uvicorn's, which drains before it closes its doors. A second signal stops it at once."""

    def __init__(self, service: Service, access_log: bool, started: Callable[[], None]):
        settings = service.settings
        super().__init__(
            uvicorn.Config(
                create_app(service),
                http=connection_class(settings),
                ws="none",
                lifespan="on",
                log_level="info" if access_log else "warning",
                access_log=access_log,
                server_header=False,
                proxy_headers=settings.trusted_proxy is not None,
                forwarded_allow_ips=settings.trusted_proxy or "",
                h11_max_incomplete_event_size=settings.head_bytes,
                timeout_keep_alive=15,
                timeout_graceful_shutdown=3,
            )
        )
        self.service = service
        self.why: Stopped = "asked"
        self._started = started
        self._tidy = Tidy()
        self._requests = 0  # that had come at the last tick: some end between two ticks
        self._tidying: asyncio.Future[None] | None = None  # kept, so that it is not collected on its way
        self._told = False
        self._deadline = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.draining:
            self.should_exit = self.force_exit = True
            return
        self.service.draining = True
        self._deadline = time.monotonic() + self.service.settings.drain_s
        log.warning("%s: nothing new is taken; up to %g s for what runs", signal.Signals(sig).name, self.service.settings.drain_s)

    async def on_tick(self, counter: int) -> bool:
        """Every 0.1 s."""
        if not self._told:
            self._told = True
            self._started()
        state = self.service.engine.state()
        if state.failure is not None and not self.service.draining:
            log.error("the engine has failed (%s); the server stops", state.failure)
            self.why = "engine"
            self.should_exit = True
        at_work = len(self.server_state.tasks)
        came, self._requests = self.server_state.total_requests - self._requests, self.server_state.total_requests
        if self._tidy.due(came + at_work + state.running + state.waiting > 0):
            self._tidying = asyncio.get_running_loop().run_in_executor(None, give_back)
        if self.service.draining:
            self.should_exit = self.should_exit or at_work == 0 or time.monotonic() > self._deadline
        return await super().on_tick(counter)
