"""`tessella serve`: the model is read, the engine started, the server opened; the body of the command, beside cli.py.

In: flags.  Out: an exit in good order, and what was served.
It imports no torch at the top, like cli.py: its flags are read for `tessella --help` too.
"""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

from tessella.errors import CheckpointError, ConfigError, TessellaError
from tessella.server.settings import Settings, new_key, reaches_only_us
from tessella.webchat import beside, check_extra

if TYPE_CHECKING:  # torch
    from tessella.checkpoint.read import Loaded
    from tessella.engine.engine import Engine
    from tessella.server.plain import PlainEngine


@dataclass(frozen=True)
class Serve:
    model: Annotated[Positional[str], arg(metavar="[MODEL]", help="Model folder, name on a hub, or tessella-nano.")] = (
        "tessella-nano"
    )
    adapter: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="NAME=DIR", help="An adapter, asked as model NAME.")] = ()
    name: str | None = None
    """The name by which clients ask for the model; default: the folder's."""
    host: str = "127.0.0.1"
    """Address to listen on; any but this machine's own asks for a key."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    api_key: Annotated[
        UseAppendAction[tuple[str, ...]], arg(metavar="KEY", help="A key that may ask; TESSELLA_API_KEY too.")
    ] = ()
    key_file: Path | None = None
    """A file of keys, one a line; lines that begin with # are passed over."""
    admin_key: str | None = None
    """The key that may load and unload adapters; TESSELLA_ADMIN_KEY too. Without one nobody may."""
    adapter_root: Path | None = None
    """Folder whose folders may be loaded as adapters while it runs."""
    public: bool = False
    """Ask for no key although strangers reach the address."""
    allow_host: tuple[str, ...] = ()
    """Names by which a keyless server may be called, beside this machine's own; for a reverse proxy."""
    cors_origin: tuple[str, ...] = ()
    """Web pages that may ask, like https://chat.example.org."""
    trusted_proxy: str | None = None
    """Address of the reverse proxy whose X-Forwarded-For is believed."""
    allow_image_urls: tuple[str, ...] = ()
    """Hosts that pictures may be fetched from, over https; default: none, pictures come as data: URLs."""
    max_tiles: int | None = None
    """Most tiles a picture is cut into, 1 to 40; default: what the model says."""
    limit_megapixels: float = 40.0
    """Largest picture that is opened."""
    max_body_mib: int = 64
    """Largest request, in MiB."""
    max_memory_mib: int = 1024
    """Requests and tiles that may be held at once, in MiB."""
    max_answers: int = 16
    """Most answers to one request."""
    default_max_tokens: int = 1024
    """Longest answer where a request says nothing."""
    requests_per_minute: int = 0
    """Most requests a minute of one client (a key at an address); 0: no limit."""
    requests_at_once: int = 1024
    """Most requests under way; more are told to come again."""
    client_at_once: int = 256
    """Most requests of one client under way."""
    answer_seconds: float = 600.0
    """Longest time for an answer."""
    drain_seconds: float = 30.0
    """Longest time that running answers get after SIGTERM."""
    workers: int | None = None
    """Threads that open pictures and compile schemas; default: half of the cores, at least 2."""
    cache_tokens: int | None = None
    """Tokens that the cache holds; default: by --cache-fraction."""
    cache_fraction: float = 0.5
    """Share of the device's free memory that the cache may take, in (0, 1]."""
    max_batch_tokens: int | None = None
    """Tokens of one step of the engine; a longer prompt runs in pieces."""
    max_running: int | None = None
    """Answers that grow side by side."""
    max_waiting: int = 512
    """Requests that wait for room; more are told to come again."""
    device: str = "auto"
    """auto (cuda, then mps, then cpu), cpu, cuda, cuda:1 or mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number type; auto: bfloat16 where the device multiplies it in hardware."""
    access_log: bool = False
    """Write a line for each request."""
    ui: bool = False
    """Open the web chat too, on this machine alone; it needs the ui extra."""
    ui_port: int | None = None
    """Port of the web chat; default: the first free one from 7860."""
    ui_compare: bool = False
    """Open the web chat with the model and its first adapter side by side."""
    ui_open: bool = True
    """Open the web chat in a browser, where there is a screen."""
    json: Path | None = None
    """Write what was served there, at the end."""

    def run(self) -> dict[str, Any]:
        from tessella.server.run import serve, take_address  # torch, and the serve extra

        adapters = [parse_adapter(text) for text in self.adapter]
        settings = self.settings()
        logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
        if self.ui_compare and not (self.ui and adapters):
            raise ConfigError("--ui-compare goes with --ui and an adapter: --ui --adapter food=runs/food --ui-compare")
        if self.ui:
            check_extra()
        with take_address(settings) as taken, ExitStack() as web_chat, self.running() as (engine, loaded):
            port = taken.getsockname()[1]

            def ready() -> None:
                print(self.greeting(settings, loaded, port), file=sys.stderr, flush=True)
                if self.ui:
                    key = settings.keys[0] if settings.keys else None
                    words = self.chat_words(settings.name, [name for name, _ in adapters])
                    web_chat.enter_context(beside(reachable(settings.host, port), key, words))

            why = serve(
                engine,
                loaded.inputs,
                settings,
                lambda name, folder: load_adapter(engine, loaded, name, folder),
                taken,
                ready,
                self.access_log,
            )
        state = engine.state()
        if why == "engine":
            raise TessellaError(f"the engine has failed: {state.failure}")
        return {"model": self.model, "answers": state.stopped + state.length, "answer_tokens": state.answer_tokens}

    @contextmanager
    def running(self) -> "Iterator[tuple[Engine | PlainEngine, Loaded]]":
        """The model with its adapters in an engine that runs for the length of the block. Raises what reading them raises."""
        from tessella.checkpoint.read import load  # torch
        from tessella.engine.engine import Engine  # torch
        from tessella.engine.request import EngineSettings  # torch
        from tessella.server.plain import PlainEngine  # torch

        loaded = load(self.model, device=self.device, dtype=self.dtype, max_tiles=self.max_tiles)
        loaded.inputs.limit_megapixels = self.limit_megapixels
        wanted = EngineSettings(
            cache_tokens=self.cache_tokens,
            cache_fraction=self.cache_fraction,
            max_batch_tokens=self.max_batch_tokens,
            max_running=self.max_running,
            max_waiting=self.max_waiting,
        )
        engine: Engine | PlainEngine  # super-link queries are beyond the engine
        if loaded.model.routing is not None:
            engine = PlainEngine(loaded, self.max_waiting)
        else:
            engine = Engine(loaded.model, loaded.tokenizer, wanted)
        engine.start()
        try:
            for name, folder in map(parse_adapter, self.adapter):
                load_adapter(engine, loaded, name, folder)
            yield engine, loaded
        finally:
            engine.stop(drain=False)

    def settings(self) -> Settings:
        """Raises ConfigError. Prints the key that it made, if it had to make one."""
        keys = (*self.api_key, *keys_in(self.key_file), *filter(None, [os.environ.get("TESSELLA_API_KEY", "")]))
        if not keys and not self.public and not reaches_only_us(self.host):
            keys = (new_key(),)
            print(f"No key was given, so one was made for this run: {keys[0]}", file=sys.stderr)
        return Settings(
            name=self.name or served_name(self.model),
            host=self.host,
            port=self.port,
            keys=keys,
            admin_key=self.admin_key or os.environ.get("TESSELLA_ADMIN_KEY") or None,
            adapter_root=self.adapter_root,
            public=self.public,
            allowed_hosts=self.allow_host,
            cors_origins=self.cors_origin,
            trusted_proxy=self.trusted_proxy,
            image_domains=self.allow_image_urls,
            picture_megapixels=self.limit_megapixels,
            body_bytes=self.max_body_mib * 2**20,
            memory_bytes=self.max_memory_mib * 2**20,
            answers=self.max_answers,
            queue=self.max_waiting,
            default_max_tokens=self.default_max_tokens,
            client_per_minute=self.requests_per_minute,
            requests_at_once=self.requests_at_once,
            client_at_once=self.client_at_once,
            answer_s=self.answer_seconds,
            drain_s=self.drain_seconds,
            workers=self.workers or max(2, (os.cpu_count() or 2) // 2),
        )

    def chat_words(self, base: str, adapters: Sequence[str]) -> list[str]:
        """What `tessella ui` is told beside the server's address."""
        words = [] if self.ui_port is None else ["--port", str(self.ui_port)]
        words += ["--compare", base, adapters[0]] if self.ui_compare else []
        return words if self.ui_open else [*words, "--no-open"]

    def greeting(self, settings: Settings, loaded: "Loaded", port: int) -> str:
        place = f"{loaded.model.device}, {str(loaded.model.dtype).removeprefix('torch.')}"
        return (
            f"{settings.name} ({place}) is served at {address(settings.host, port)}/v1; /docs tells its fields. Ctrl-C stops it."
        )


def address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def reachable(host: str, port: int) -> str:
    """Where this machine itself reaches a server that listens on host, which may stand for every address."""
    return address({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)


def served_name(model: str) -> str:
    """What clients call a model that was given no name: a folder's own name, a hub's owner/name, tessella-nano."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve().name
    return model.partition(":")[2].partition("@")[0] if ":" in model else model.partition("@")[0]


def keys_in(path: Path | None) -> list[str]:
    """Raises ConfigError."""
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--key-file {path} cannot be read ({error}); give a text file with one key a line") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"--key-file {path} holds no key; write one a line")
    return keys


def parse_adapter(text: str) -> tuple[str, Path]:
    """NAME=DIR. Raises ConfigError."""
    name, sign, folder = text.partition("=")
    if not sign or not name or not folder:
        raise ConfigError(f'--adapter is "{text}", must be NAME=DIR, like food=runs/food')
    return name, Path(folder).expanduser()


def load_adapter(engine: "Engine | PlainEngine", loaded: "Loaded", name: str, folder: Path) -> None:
    """Read an adapter, fit it to the model, and hand it to the engine. Raises CheckpointError, EngineError."""
    from tessella.checkpoint.adapters import learned_in, read_adapter  # torch
    from tessella.checkpoint.fingerprint import require_base  # torch
    from tessella.checkpoint.lowrank import fit  # torch
    from tessella.checkpoint.read import stored_parameters  # torch

    there = learned_in(folder)
    if not there.is_dir():
        raise CheckpointError(f"{folder} is no folder; give the one that finetune wrote")
    shapes = {parameter: tuple(weight.shape) for parameter, weight in loaded.model.named_parameters()}
    found = read_adapter(there)
    adapter = fit(found, shapes, loaded.config.language)
    require_base(there, found.base, str(loaded.folder), *stored_parameters(loaded.folder))
    if adapter.has_dora:
        raise CheckpointError(
            f"{folder} is DoRA, which changes every row of a weight and cannot run beside other adapters; "
            f"serve it by itself (tessella serve {folder}), or merge it with tessella convert"
        )
    engine.load_adapter(name, adapter.pairs, adapter.whole)
