"""What the server is allowed to do: who may ask, how much, how long. Closed by default; checked where it is made.

In: the flags of `tessella serve`.  Out: Settings, frozen.
"""

import ipaddress
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from tessella.errors import ConfigError

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_HOST = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")


@dataclass(frozen=True)
class Settings:
    """All limits of one server. A number of requests or bytes is at least 1, seconds are more than 0."""

    name: str  # the model's, as clients ask for it
    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()  # any of them opens the door; () asks for none
    admin_key: str | None = None  # opens loading and unloading of adapters; None: nobody may
    adapter_root: Path | None = None  # adapters are loaded from folders in it, and from nowhere else
    public: bool = False  # no key although strangers reach the address
    allowed_hosts: tuple[str, ...] = ()  # names by which we may be called, beside our own; for a reverse proxy
    cors_origins: tuple[str, ...] = ()  # web pages that may ask, https://chat.example.org
    trusted_proxy: str | None = None  # the address whose X-Forwarded-For is believed

    image_domains: tuple[str, ...] = ()  # hosts that pictures are fetched from; (): none is fetched
    fetch_s: float = 10.0  # for one picture, redirects counted
    fetch_redirects: int = 3
    picture_bytes: int = 20 * 2**20  # of one picture, encoded
    picture_megapixels: float = 40.0  # of one picture
    request_megapixels: float = 100.0  # of all pictures of one request
    pictures: int = 32  # in one request

    body_bytes: int = 64 * 2**20  # of one request
    memory_bytes: int = 2**30  # bodies and tiles of all requests together
    head_bytes: int = 32 * 2**10  # request line and headers
    head_s: float = 10.0  # for them to arrive
    body_s: float = 60.0  # for the body to arrive
    answer_s: float = 600.0  # for the whole answer
    write_s: float = 30.0  # that a client may leave a piece of its answer unread
    drain_s: float = 30.0  # after SIGTERM
    connections: int = 2000
    requests_at_once: int = 1024  # from the head on; more are refused with 429
    client_at_once: int = 256  # of one client
    client_per_minute: int = 0  # of one client; 0: no limit
    answers: int = 16  # of one request: n, times the prompts of a completion
    queue: int = 512  # requests that wait in the engine
    default_max_tokens: int = 1024  # where a request says nothing, or what the context still holds
    schema_bytes: int = 32 * 2**10
    workers: int = 2  # threads that open pictures and compile schemas

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w][\w./:@-]{0,127}", self.name):
            raise ConfigError(
                f'name is "{self.name}"; letters, digits and . / : @ _ - only, at most 128: give another with --name'
            )
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}, must be in [0, 65535]; 0 takes a free one")
        for field in (
            "fetch_s",
            "picture_megapixels",
            "request_megapixels",
            "head_s",
            "body_s",
            "answer_s",
            "write_s",
            "drain_s",
        ):
            self._check(field, self.__dict__[field] > 0, "more than 0")
        for field in (
            *("picture_bytes", "pictures", "body_bytes", "memory_bytes", "head_bytes", "connections", "requests_at_once"),
            *("client_at_once", "answers", "queue", "default_max_tokens", "schema_bytes", "workers"),
        ):
            self._check(field, self.__dict__[field] >= 1, "at least 1")
        self._check("client_per_minute", self.client_per_minute >= 0, "0 (no limit) or more")
        self._check("fetch_redirects", 0 <= self.fetch_redirects <= 10, "in [0, 10]")
        if short := [key for key in (*self.keys, self.admin_key or "x" * 16) if len(key) < 16]:
            raise ConfigError(f"a key has {len(short[0])} characters, must have at least 16; openssl rand -hex 16 makes one")
        for key in (*self.keys, self.admin_key or "x"):
            if not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError("a key holds a space or a sign that is not ASCII; letters, digits and marks only")
        if self.admin_key is not None and self.admin_key in self.keys:
            raise ConfigError("the admin key is one of the keys; give it one of its own")
        for domain in self.image_domains:
            if not _HOST.fullmatch(domain) or is_address(domain):
                raise ConfigError(f'"{domain}" is no domain; give a lower-case name like images.example.org, without https://')
        for origin in self.cors_origins:
            if not re.fullmatch(r"https?://[^/\s*]+", origin):
                raise ConfigError(f'CORS origin "{origin}" must be like https://chat.example.org, without a path and without *')
        if not self.on_loopback and not self.keys and not self.public:
            raise ConfigError(
                f"{self.host} can be reached by others, and there is no key; give one, or say --public if anybody may ask"
            )

    def _check(self, field: str, legal: bool, range_: str) -> None:
        if not legal:
            raise ConfigError(f"{field} is {self.__dict__[field]}, must be {range_}")

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine reaches us."""
        return reaches_only_us(self.host)


def new_key() -> str:
    return f"tessella-{secrets.token_urlsafe(24)}"


def reaches_only_us(host: str) -> bool:
    """localhost and loopback addresses; a name is not looked up, so any other name counts as reachable."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
