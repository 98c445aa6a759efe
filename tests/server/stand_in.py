"""A server under test, on a real port, with an engine whose answers a test decides.

In: Settings, a ScriptedEngine.  Out: a Live server with its address.
"""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from tessella.engine.request import EngineState, Finish, Logprob, OnPiece, Piece, Request, Usage
from tessella.errors import ContextError, EngineError, QueueFull, TessellaError
from tessella.inputs import Inputs
from tessella.server.run import Server, take_address
from tessella.server.service import Service
from tessella.server.settings import Settings
from tessella.tokenizer import Tokenizer
from tiny import tiny_config, tiny_folder

NAME = "tiny"
WORDS = "This is a red apple on a white plate. "


@cache
def folder() -> Path:
    return tiny_folder(Path(mkdtemp(prefix="tessella-server-")) / NAME, "InternLM2ForCausalLM")


@cache
def inputs() -> Inputs:
    return Inputs(tiny_config("InternLM2ForCausalLM"), Tokenizer.load(folder()))


@dataclass
class Script:
    """One answer under way."""

    request: Request
    on_piece: OnPiece
    gone: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self.gone.set()


@dataclass
class ScriptedEngine:
    """Says WORDS over and over, one token each step_s, until max_tokens; each answer in a thread of its own."""

    step_s: float = 0.0
    max_waiting: int = 512
    fail_after: int | None = None  # tokens, then an error
    longest_row: int = 4096
    adapters: dict[str, Path] = field(default_factory=dict)
    alive: bool = True
    failure: str | None = None
    seen: list[Request] = field(default_factory=list)
    cancelled: int = 0
    ended: int = 0
    running: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def submit(self, request: Request, on_piece: OnPiece) -> Script:
        if not self.alive:
            raise EngineError("the engine has stopped")
        if self.running >= self.max_waiting:
            raise QueueFull("as many wait as may wait")
        if len(request.prompt) + request.params.max_tokens > self.longest_row:
            raise ContextError("too long for the cache")
        script = Script(request, on_piece)
        with self.lock:
            self.seen.append(request)
            self.running += 1
        threading.Thread(target=self._answer, args=(script,), daemon=True).start()
        return script

    def _answer(self, script: Script) -> None:
        start = time.perf_counter()
        request = script.request
        finish: Finish = "length"
        error, count = None, 0
        draw = Draw(request)
        for count in range(1, request.params.max_tokens + 1):
            if self.step_s:
                script.gone.wait(self.step_s)
            if script.gone.is_set():
                finish, count = "cancelled", count - 1
                break
            if self.fail_after is not None and count > self.fail_after:
                finish, error, count = "error", "the answer could not be finished: a test says so", count - 1
                break
            try:
                token = draw.next()
            except TessellaError as told:
                finish, error, count = "error", str(told), count - 1
                break
            if token is None:
                finish, count = "stop", count - 1
                break
            top = tuple((token + i, -1.0 - i) for i in range(request.logprobs or 0))
            logprobs = (Logprob(token, -0.5, top),) if request.logprobs is not None else ()
            script.on_piece(Piece(text=inputs().tokenizer.decode([token]), ids=(token,), logprobs=logprobs))
        first = time.perf_counter() - start if count else None
        usage = Usage(len(request.prompt), 0, count, len(request.prompt.digests), first)
        with self.lock:
            self.running -= 1
            self.ended += 1
            self.cancelled += finish == "cancelled"
        script.on_piece(Piece(finish=finish, error=error, usage=usage))

    def state(self) -> EngineState:
        return EngineState(
            alive=self.alive,
            draining=False,
            failure=self.failure,
            waiting=0,
            running=self.running,
            blocks=8,
            blocks_used=self.running,
            blocks_cached=0,
            vision_bytes=0,
            adapters=tuple(self.adapters),
        )

    def load_adapter(self, name: str, folder: Path) -> None:
        if not (folder / "adapter_config.json").is_file():
            raise TessellaError(f"{folder} holds no adapter_config.json")
        self.adapters[name] = folder

    def unload_adapter(self, name: str) -> None:
        if name not in self.adapters:
            raise EngineError(f'there is no adapter "{name}"')
        del self.adapters[name]


class Draw:
    """Which id comes next: of the mask by chance, else of WORDS; None at the end."""

    def __init__(self, request: Request):
        self.request = request
        self.words = inputs().tokenizer.encode(WORDS)
        self.place = request.params.seed or 0
        self.chance = torch.Generator().manual_seed(request.params.seed or 0)
        self.bits = torch.zeros((inputs().config.language.vocab_size + 31) // 32, dtype=torch.int32)

    def next(self) -> int | None:
        mask = self.request.mask
        self.place += 1
        if mask is None:
            return self.words[(self.place - 1) % len(self.words)]
        mask.fill(self.bits)
        allowed = [i for i in range(32 * len(self.bits)) if (int(self.bits[i // 32]) >> (i % 32)) & 1]
        assert allowed, "a mask must allow something"
        stops = [i for i in allowed if i in self.request.stop_ids]
        if stops and (len(stops) == len(allowed) or self.place > 60):
            return None
        allowed = [i for i in allowed if i not in stops]
        if closing := [i for i in allowed if inputs().tokenizer.decode([i]) in ('"', "}", "]", '"}')]:  # else texts never end
            allowed = closing
        token = allowed[int(torch.randint(len(allowed), (1,), generator=self.chance))]
        mask.accept(token)
        return token


@dataclass
class Live:
    url: str
    service: Service
    server: Server
    engine: ScriptedEngine

    def headers(self) -> dict[str, str]:
        keys = self.service.settings.keys
        return {"authorization": f"Bearer {keys[0]}"} if keys else {}


@contextmanager
def live(engine: Any = None, some_inputs: Inputs | None = None, **settings: Any) -> Iterator[Live]:
    """A server on a free port, for the length of the block."""
    engine = engine or ScriptedEngine()
    wanted = replace(Settings(NAME, port=0), **settings)
    box: list[Live] = []
    started = threading.Event()

    def run() -> None:
        with take_address(wanted) as listening:
            asyncio.run(life(listening))

    async def life(listening: Any) -> None:
        service = Service(engine, some_inputs or inputs(), wanted, engine.load_adapter)
        server = Server(service, False, started.set)
        box.append(Live(f"http://127.0.0.1:{listening.getsockname()[1]}", service, server, engine))
        await server.serve([listening])

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(120), "the server did not start"
    try:
        yield box[0]
    finally:
        box[0].server.should_exit = True
        thread.join(120)
        assert not thread.is_alive(), "the server did not stop"
