"""Pictures from the web, for a server that was told which hosts to trust; from no other place than these.

In: an https URL.  Out: at most picture_bytes bytes of an image, or a Refusal 400.
The URL is taken apart once, by one strict pattern; the name is looked up once, and that address is connected to, so that a name
cannot point elsewhere in between (rebinding). Addresses that are not of the public internet are refused, in any spelling.
Each redirect goes through all of it again. The environment's proxies are not used.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import urljoin

import httpx2

from tessella.server.pictures import too_many_bytes
from tessella.server.refusal import Refusal
from tessella.server.settings import Settings

# No user, no other port, no backslash, no space, no control sign; letters outside ASCII must be percent-encoded.
_URL = re.compile(r"https://(?P<host>[A-Za-z0-9.-]{1,253})(:443)?(?P<rest>[/?][!$-;=?-Z_a-z~\[\]]*)?(#[!-~]*)?")
LONGEST_URL = 4096
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# What some versions of Python count as global: protocol assignments, the old 6to4 relays, and IPv6 that tunnels IPv4.
_SPECIAL = [ipaddress.ip_network(one) for one in ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2002::/16", "64:ff9b:1::/48")]
Resolve = Callable[[str], Awaitable[list[str]]]


@dataclass(frozen=True)
class Place:
    """Where a picture is: host is one of the allowed names."""

    host: str
    rest: str  # path and query


async def look_up(host: str) -> list[str]:
    """All addresses of a name, IPv4 first."""
    found = await asyncio.get_running_loop().getaddrinfo(host, 443, type=socket.SOCK_STREAM)
    return [str(address[0]) for _, _, _, _, address in sorted(found, key=lambda one: one[0] != socket.AF_INET)]


class Fetcher:
    """resolve and transport are for tests; nothing else sets them."""

    def __init__(self, settings: Settings, resolve: Resolve = look_up, transport: httpx2.AsyncBaseTransport | None = None):
        self.settings = settings
        self._resolve = resolve
        self._client = httpx2.AsyncClient(
            trust_env=False,
            follow_redirects=False,
            timeout=settings.fetch_s,
            transport=transport,
            limits=httpx2.Limits(max_connections=32),
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def fetch(self, url: str, where: str) -> bytes:
        """Raises Refusal 400: not allowed, not to be had; 413: too many bytes."""
        try:
            async with asyncio.timeout(self.settings.fetch_s):
                for _ in range(self.settings.fetch_redirects + 1):
                    place = self.place_of(url, where)
                    answer = await self._get(place, where)
                    if isinstance(answer, bytes):
                        return answer
                    url = urljoin(f"https://{place.host}{place.rest}", answer)
        except TimeoutError as error:
            raise _unfetched(where, f"did not arrive within {self.settings.fetch_s:g} seconds") from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise _unfetched(where, "could not be fetched") from error
        raise _unfetched(where, f"is behind more than {self.settings.fetch_redirects} redirects")

    def place_of(self, url: str, where: str) -> Place:
        """Raises Refusal 400 for anything but https://ALLOWED-HOST/…"""
        domains = self.settings.image_domains
        if not domains:
            raise _refused(where, "pictures are not fetched from the web here; send a data: URL")
        parts = _URL.fullmatch(url) if len(url) <= LONGEST_URL else None
        host = parts["host"].lower() if parts else ""
        if parts is None or host not in domains:
            raise _refused(where, f"pictures are fetched from https://HOST/… of {', '.join(domains)} only; send a data: URL")
        return Place(host, parts["rest"] or "/")

    async def _get(self, place: Place, where: str) -> bytes | str:
        """The picture, or where it has moved to."""
        address = await self._address(place.host, where)
        netloc = f"[{address}]" if ":" in address else address
        request = self._client.build_request(
            "GET",
            f"https://{netloc}{place.rest}",
            headers={"host": place.host, "accept": "image/*", "accept-encoding": "identity", "user-agent": "tessella"},
            extensions={"sni_hostname": place.host},  # the certificate is checked for the name, not for the address
        )
        response = await self._client.send(request, stream=True)
        try:
            if response.is_redirect:
                return response.headers.get("location", "")
            if response.status_code != 200:
                raise _unfetched(where, f"is not there (status {response.status_code})")
            if response.headers.get("content-encoding", "identity") != "identity":
                raise _unfetched(where, "came packed")
            return await self._read(response, where)
        finally:
            await response.aclose()

    async def _read(self, response: httpx2.Response, where: str) -> bytes:
        data = bytearray()
        async for part in response.aiter_raw():
            data += part
            if len(data) > self.settings.picture_bytes:
                raise too_many_bytes(where, self.settings)
        return bytes(data)

    async def _address(self, host: str, where: str) -> str:
        """The one address that will be connected to. Raises Refusal when any of the name's addresses is not public."""
        try:
            addresses = await self._resolve(host)
        except (OSError, UnicodeError) as error:
            raise _unfetched(where, "could not be fetched") from error
        if not addresses or not all(is_public(address) for address in addresses):
            raise _refused(where, "the host has an address that is not of the public internet")
        return addresses[0]


def is_public(address: str) -> bool:
    """Whether a stranger may make us connect there; looks into IPv6 addresses that hold an IPv4 one."""
    try:
        known = ipaddress.ip_address(address)
    except ValueError:
        return False  # decimal, octal, with a zone: not the form in which a resolver answers
    if isinstance(known, ipaddress.IPv6Address):
        inner = known.ipv4_mapped or (ipaddress.IPv4Address(int(known) & 0xFFFFFFFF) if known in _NAT64 else None)
        if inner is not None:
            return is_public(str(inner))
    if any(known in network for network in _SPECIAL if network.version == known.version):
        return False
    return known.is_global and not known.is_multicast and not known.is_reserved


def _refused(where: str, what: str) -> Refusal:
    return Refusal(400, f"{where}: {what}", param=where, code="image_url_not_allowed")


def _unfetched(where: str, what: str) -> Refusal:
    return Refusal(400, f"{where} {what}; send a data: URL", param=where, code="image_url_failed")
