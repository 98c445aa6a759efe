"""Pictures from the web come from allowed hosts on the public internet alone, however the address is spelt."""

import asyncio
import io
from collections.abc import AsyncIterator, Callable

import httpx2
import pytest
from PIL import Image
from stand_in import NAME

from tessella.server.fetch import Fetcher, is_public, look_up
from tessella.server.refusal import Refusal
from tessella.server.settings import Settings

HOST = "pics.example.org"
PUBLIC = "93.184.216.34"
Answer = Callable[[httpx2.Request], httpx2.Response]


class Bytes(httpx2.AsyncByteStream):
    def __init__(self, data: bytes, times: int = 1):
        self.data, self.times = data, times

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for _ in range(self.times):
            yield self.data


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "PNG")
    return stream.getvalue()


class Web:
    """Answers to a Fetcher, and what it was asked. addresses: what each look-up gives, the last one for good."""

    def __init__(self, *addresses: list[str], answer: Answer | None = None, **settings: object):
        self.lookups: list[str] = []
        self.requests: list[httpx2.Request] = []
        self._addresses = list(addresses) or [[PUBLIC]]
        self._answer = answer or (lambda request: httpx2.Response(200, stream=Bytes(png())))
        wanted = Settings(**{"name": NAME, "image_domains": (HOST, "more.example.org"), **settings})  # type: ignore[arg-type]
        self._fetcher = Fetcher(wanted, self._resolve, httpx2.MockTransport(self._respond))

    async def _resolve(self, host: str) -> list[str]:
        self.lookups.append(host)
        return self._addresses.pop(0) if len(self._addresses) > 1 else self._addresses[0]

    async def _respond(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        response = self._answer(request)
        if response.status_code == 299:
            await asyncio.sleep(10)
        return response

    def get(self, url: str) -> bytes:
        return asyncio.run(self._fetcher.fetch(url, "messages.0.content.0.image_url.url"))

    def refused(self, url: str) -> str:
        with pytest.raises(Refusal) as told:
            self.get(url)
        assert told.value.status in (400, 413)
        return str(told.value.body.error.code)


def test_a_picture_is_fetched_from_the_address_that_was_checked_under_the_name_that_was_asked() -> None:
    web = Web()
    assert web.get(f"https://{HOST}/a%20b.png?size=2#top") == png()
    (request,) = web.requests
    assert (request.url.host, request.url.raw_path) == (PUBLIC, b"/a%20b.png?size=2")
    assert (request.headers["host"], request.extensions["sni_hostname"]) == (HOST, HOST)
    assert request.headers["accept-encoding"] == "identity"
    assert not {"authorization", "cookie"} & set(request.headers)


def test_a_name_that_points_elsewhere_the_second_time_is_asked_once() -> None:
    web = Web([PUBLIC], ["127.0.0.1"])
    web.get(f"https://{HOST}/a.png")
    assert web.lookups == [HOST]
    assert web.requests[0].url.host == PUBLIC
    assert web.refused(f"https://{HOST}/a.png") == "image_url_not_allowed"
    assert len(web.requests) == 1


REFUSED = (
    *("", "/etc/passwd", "../../etc/passwd", "file:///etc/passwd", "file:/etc/passwd", "FILE:///etc/passwd"),
    *("http://pics.example.org/a.png", "ftp://pics.example.org/a.png", "gopher://pics.example.org/", "javascript:alert(1)"),
    *("https://evil.org/a.png", "https://evil.org/#pics.example.org", "https://evil.org/?pics.example.org"),
    *("https://pics.example.org.evil.org/a", "https://evilpics.example.org/a", "https://example.org/a"),
    *("https://pics.example.org@evil.org/a", "https://evil.org@pics.example.org/a", "https://:p@pics.example.org/a"),
    *("https://pics.example.org\\@evil.org/a", "https://evil.org\\@pics.example.org/a", "https:\\\\pics.example.org\\a"),
    *("https:/pics.example.org/a", "https:pics.example.org/a", "//pics.example.org/a", "https:///pics.example.org/a"),
    *("https://pics.example.org:8443/a", "https://pics.example.org:/a", "https://pics.example.org:443@evil.org/a"),
    *("https://127.0.0.1/a", "https://2130706433/a", "https://0177.0.0.1/a", "https://0x7f.0.0.1/a", "https://127.1/a"),
    *("https://[::1]/a", "https://[::ffff:127.0.0.1]/a", "https://[fd00::1]/a", "https://169.254.169.254/latest/meta-data/"),
    *(
        "https://localhost/a",
        "https://pics.example.org./a",
        "https://pics.example.org%2eevil.org/a",
        "https://pics%2eexample.org/a",
    ),
    *(
        "https://pics.example.org/a b",
        "https://pics.example.org/a\n",
        " https://pics.example.org/a",
        "https://pics.example.org/\x00",
    ),
    *(
        "https://pics。example.org/a",
        "https://ⓟics.example.org/a",
        "https://pics.example.org/ä",
        "https://pics.example.org" + "/a" * 3000,
    ),
)


def test_any_other_address_is_refused_before_a_name_is_looked_up() -> None:
    web = Web()
    for url in REFUSED:
        assert web.refused(url) == "image_url_not_allowed", url
    assert not web.lookups
    assert not web.requests


INSIDE = (
    *(
        "127.0.0.1",
        "127.8.8.8",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "192.0.2.1",
    ),
    *("198.18.0.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "192.0.0.8"),
    *(
        "::",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd12::1",
        "ff02::1",
        "2001::1",
        "2001:db8::1",
        "::ffff:127.0.0.1",
        "::ffff:7f00:1",
    ),
    *("::ffff:169.254.169.254", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2002:c0a8:1::1", "100::1"),
    *("2130706433", "0177.0.0.1", "0x7f.0.0.1", "127.1", "", "localhost"),
)


def test_a_host_with_an_address_off_the_public_internet_is_refused() -> None:
    for address in INSIDE:
        assert not is_public(address), address
        web = Web([PUBLIC, address])
        assert web.refused(f"https://{HOST}/a.png") == "image_url_not_allowed"
        assert not web.requests


def test_public_addresses_are_public() -> None:
    for address in (PUBLIC, "8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"):
        assert is_public(address)


def moved(to: str, times: int = 1) -> Answer:
    left = [times]

    def answer(request: httpx2.Request) -> httpx2.Response:
        if left[0]:
            left[0] -= 1
            return httpx2.Response(302, headers={"location": to})
        return httpx2.Response(200, stream=Bytes(png()))

    return answer


def test_a_redirect_goes_through_every_check_again() -> None:
    web = Web([PUBLIC], ["93.184.216.35"], answer=moved("https://more.example.org/b.png"))
    assert web.get(f"https://{HOST}/a.png") == png()
    assert [request.url.host for request in web.requests] == [PUBLIC, "93.184.216.35"]
    web = Web(answer=moved("/b.png"))
    web.get(f"https://{HOST}/a.png")
    assert web.requests[1].url.raw_path == b"/b.png"


@pytest.mark.parametrize(
    "to",
    [
        "https://evil.org/",
        "http://pics.example.org/a",
        "//evil.org/a",
        "file:///etc/passwd",
        "https://127.0.0.1/",
        "\\\\evil.org\\a",
    ],
)
def test_a_redirect_to_a_place_that_is_not_allowed_is_not_followed(to: str) -> None:
    web = Web(answer=moved(to))
    if web.refused(f"https://{HOST}/a.png") != "image_url_not_allowed":
        assert all(request.url.host == PUBLIC for request in web.requests)
    else:
        assert len(web.requests) == 1


def test_a_redirect_to_a_name_that_now_points_inside_is_not_followed() -> None:
    web = Web([PUBLIC], ["10.0.0.1"], answer=moved("/b.png"))
    assert web.refused(f"https://{HOST}/a.png") == "image_url_not_allowed"
    assert len(web.requests) == 1


def test_redirects_without_end_end() -> None:
    web = Web(answer=moved("/again", times=100))
    assert web.refused(f"https://{HOST}/a.png") == "image_url_failed"
    assert len(web.requests) == 4


def test_bytes_and_time_are_limited_and_what_is_not_there_is_told() -> None:
    url = f"https://{HOST}/a.png"

    assert (
        Web(answer=lambda _: httpx2.Response(200, stream=Bytes(b"x" * 1000, 10**9)), picture_bytes=5000).refused(url)
        == "image_too_large"
    )
    assert Web(answer=lambda _: httpx2.Response(299), fetch_s=0.1).refused(url) == "image_url_failed"
    assert Web(answer=lambda _: httpx2.Response(404)).refused(url) == "image_url_failed"
    assert (
        Web(answer=lambda _: httpx2.Response(200, headers={"content-encoding": "br"}, content=b"")).refused(url)
        == "image_url_failed"
    )
    assert Web([]).refused(url) == "image_url_not_allowed"


def test_nothing_is_fetched_by_a_server_that_was_told_no_host() -> None:
    web = Web(image_domains=())
    assert web.refused(f"https://{HOST}/a.png") == "image_url_not_allowed"
    assert not web.lookups


def test_the_real_look_up_gives_plain_addresses() -> None:
    assert "127.0.0.1" in asyncio.run(look_up("127.0.0.1"))
