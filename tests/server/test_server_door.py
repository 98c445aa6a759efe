"""Closed by default: who may ask, from where, and how much."""

from pathlib import Path
from typing import Any

import httpx2
import pytest
from stand_in import NAME, ScriptedEngine, live

from tessella.errors import ConfigError
from tessella.server.keys import Keys
from tessella.server.limits import AtOnce, Budget, Rate
from tessella.server.refusal import Refusal
from tessella.server.settings import Settings

KEY, OTHER, ADMIN = "k" * 20, "o" * 20, "a" * 20
BODY = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def code(response: httpx2.Response) -> tuple[int, Any]:
    return response.status_code, response.json()["error"]["code"]


def test_strangers_need_a_key_and_no_flag_implies_that_they_do_not() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "my-host"):
        with pytest.raises(ConfigError, match="--public"):
            Settings(NAME, host=host)
        assert Settings(NAME, host=host, public=True).keys == ()
        assert Settings(NAME, host=host, keys=(KEY,)).keys == (KEY,)
    for host in ("127.0.0.1", "127.8.0.1", "::1", "localhost"):
        assert Settings(NAME, host=host).on_loopback


@pytest.mark.parametrize(
    "wrong",
    [
        {"keys": ("short",)},
        {"keys": ("with a space in it",)},
        {"keys": (KEY,), "admin_key": KEY},
        {"image_domains": ("https://a.org",)},
        {"image_domains": ("127.0.0.1",)},
        {"image_domains": ("*",)},
        {"cors_origins": ("*",)},
        {"cors_origins": ("chat.example.org",)},
        {"port": 70000},
        {"answer_s": 0.0},
        {"workers": 0},
        {"name": "a b"},
    ],
)
def test_senseless_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Settings(**{"name": NAME, **wrong})


def test_a_server_with_keys_opens_to_each_of_them_and_to_nothing_else() -> None:
    with live(keys=(KEY, OTHER)) as server, httpx2.Client(base_url=server.url) as client:
        for path in ("/v1/models", "/metrics", "/nowhere"):
            for headers in (
                {},
                {"authorization": "Bearer"},
                bearer(KEY[:-1]),
                bearer(KEY + "x"),
                {"authorization": f"Basic {KEY}"},
                bearer("\u00e9"),
            ):
                answer = client.get(path, headers={key: value.encode("latin-1") for key, value in headers.items()})
                assert code(answer) == (401, "invalid_api_key")
                assert answer.headers["www-authenticate"] == "Bearer"
        for key in (KEY, OTHER):
            assert client.get("/v1/models", headers=bearer(key)).status_code == 200
            assert client.post("/v1/chat/completions", json=BODY, headers=bearer(key)).status_code == 200
        assert client.post("/v1/chat/completions", json=BODY).status_code == 401
        for path in ("/health", "/ready", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200


def test_every_key_is_compared_whole_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr("tessella.server.keys.hmac.compare_digest", lambda a, b: compared.append((len(a), len(b))) or a == b)
    keys = Keys([KEY, OTHER])
    assert keys.find(b"Bearer " + KEY.encode()) == 0
    assert keys.find(b"Bearer x") is None
    assert compared == [(32, 32)] * 4


def test_a_name_that_strangers_own_does_not_lead_to_a_keyless_server() -> None:
    with live() as server, httpx2.Client(base_url=server.url) as client:
        for host in ("evil.example.org", "evil.example.org:8000", "127.0.0.1.evil.org", "169.254.169.254", ""):
            assert code(client.get("/v1/models", headers={"host": host})) == (403, "unknown_host")
        for own in ("localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000"):
            assert client.get("/v1/models", headers={"host": own}).status_code == 200


def test_a_proxied_server_knows_the_names_that_it_was_told() -> None:
    with live(allowed_hosts=("chat.example.org",)) as server, httpx2.Client(base_url=server.url) as client:
        assert client.get("/v1/models", headers={"host": "chat.example.org"}).status_code == 200


def test_only_named_web_pages_may_ask() -> None:
    page = "https://chat.example.org"
    with live(cors_origins=(page,)) as server, httpx2.Client(base_url=server.url) as client:
        allowed = client.post("/v1/chat/completions", json=BODY, headers={"origin": page})
        assert allowed.headers["access-control-allow-origin"] == page
        assert "access-control-allow-credentials" not in allowed.headers
        for origin in ("https://evil.org", "null", f"{page}.evil.org", "http://chat.example.org", "file://"):
            answer = client.post("/v1/chat/completions", json=BODY, headers={"origin": origin})
            assert code(answer) == (403, "unknown_origin")
            assert "access-control-allow-origin" not in answer.headers
            assert client.get("/health", headers={"origin": origin}).status_code == 403
        ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        preflight = client.options("/v1/chat/completions", headers={"origin": page, **ask})
        assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (204, page)
        assert client.options("/v1/chat/completions", headers={"origin": "https://evil.org", **ask}).status_code == 403


def test_a_form_of_a_strange_page_is_not_read() -> None:
    with live() as server, httpx2.Client(base_url=server.url) as client:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
            answer = client.post("/v1/chat/completions", content=b"{}", headers={"content-type": kind})
            assert code(answer) == (415, "content_type")


def test_every_response_forbids_guessing_and_keeping() -> None:
    with live() as server, httpx2.Client(base_url=server.url) as client:
        for path in ("/health", "/nowhere", "/v1/models", "/docs"):
            headers = client.get(path).headers
            assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store")
            assert len(headers["x-request-id"]) == 16
            assert "server" not in headers


def test_a_client_that_asks_too_often_is_told_when_to_come_again() -> None:
    with live(client_per_minute=3, keys=(KEY, OTHER)) as server, httpx2.Client(base_url=server.url) as client:
        answers = [client.get("/v1/models", headers=bearer(KEY)) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 20
        assert client.get("/v1/models", headers=bearer(OTHER)).status_code == 200
        assert client.get("/health").status_code == 200


def test_the_bucket_fills_with_time_and_holds_no_more_than_a_minute() -> None:
    now = [0.0]
    rate = Rate(60, clock=lambda: now[0])
    for _ in range(60):
        rate.take("me")
    with pytest.raises(Refusal):
        rate.take("me")
    now[0] += 1.0
    rate.take("me")
    now[0] += 3600
    for _ in range(60):
        rate.take("me")
    with pytest.raises(Refusal):
        rate.take("me")


def test_places_and_bytes_are_given_back() -> None:
    at_once, budget = AtOnce(2, 1), Budget(10)
    with at_once.held("a"):
        with pytest.raises(Refusal, match="your requests"), at_once.held("a"):
            pass
        with at_once.held("b"), pytest.raises(Refusal, match="are under way"), at_once.held("c"):
            pass
    assert (at_once.total, at_once.now) == (0, {})
    budget.take(10)
    with pytest.raises(Refusal):
        budget.take(1)
    budget.give_back(10)
    budget.take(10)


def test_requests_of_one_client_at_once_are_bounded() -> None:
    wish = {**BODY, "stream": True, "max_tokens": 50}
    with live(ScriptedEngine(step_s=0.2), client_at_once=1) as server:
        address = f"{server.url}/v1/chat/completions"
        with httpx2.stream("POST", address, json=wish):
            assert code(httpx2.post(address, json=BODY)) == (429, "too_many_at_once")


# ---- adapters


def adapters_in(root: Path) -> None:
    for name in ("food", "cars"):
        (root / "root" / name).mkdir(parents=True)
        (root / "root" / name / "adapter_config.json").write_text("{}")
    (root / "outside").mkdir()
    (root / "outside" / "adapter_config.json").write_text("{}")
    (root / "root" / "link").symlink_to(root / "outside")


def test_adapters_are_loaded_and_unloaded_by_the_admin_alone(tmp_path: Path) -> None:
    adapters_in(tmp_path)
    wish = {"name": "dishes", "folder": "food"}
    with (
        live(keys=(KEY,), admin_key=ADMIN, adapter_root=tmp_path / "root") as server,
        httpx2.Client(base_url=server.url) as client,
    ):
        assert client.post("/v1/adapters", json=wish, headers=bearer(KEY)).status_code == 401
        assert client.post("/v1/adapters", json=wish).status_code == 401
        made = client.post("/v1/adapters", json=wish, headers=bearer(ADMIN))
        assert (made.status_code, made.json()["parent"]) == (201, NAME)
        listed = client.get("/v1/models", headers=bearer(KEY)).json()["data"]
        assert [model["id"] for model in listed] == [NAME, "dishes"]
        assert client.post("/v1/chat/completions", json={**BODY, "model": "dishes"}, headers=bearer(KEY)).status_code == 200
        assert server.engine.seen[-1].adapter == "dishes"
        assert code(client.post("/v1/adapters", json=wish, headers=bearer(ADMIN))) == (409, "name_taken")
        assert code(client.post("/v1/adapters", json={**wish, "name": NAME}, headers=bearer(ADMIN))) == (409, "name_taken")
        assert client.delete("/v1/adapters/dishes", headers=bearer(KEY)).status_code == 401
        assert client.delete("/v1/adapters/dishes", headers=bearer(ADMIN)).json() == {"status": "unloaded"}
        assert client.delete("/v1/adapters/dishes", headers=bearer(ADMIN)).status_code == 404
        answer = client.post("/v1/chat/completions", json={**BODY, "model": "dishes"}, headers=bearer(KEY))
        assert code(answer) == (404, "model_not_found")
        assert client.get("/v1/models", headers=bearer(ADMIN)).status_code == 401


def test_an_adapter_is_loaded_from_a_folder_in_the_root_and_from_nowhere_else(tmp_path: Path) -> None:
    adapters_in(tmp_path)
    with live(admin_key=ADMIN, adapter_root=tmp_path / "root") as server, httpx2.Client(base_url=server.url) as client:
        for folder in ("../outside", "link", ".", "..", "nowhere", "/etc", "food/../../outside", "a\x00b", "food\\..", "~"):
            answer = client.post("/v1/adapters", json={"name": "x", "folder": folder}, headers=bearer(ADMIN))
            assert code(answer) == (400, "no_such_folder"), folder


def test_without_an_admin_key_nobody_loads_and_without_a_root_nothing_is_loaded(tmp_path: Path) -> None:
    wish = {"name": "x", "folder": "food"}
    with live() as server:
        assert code(httpx2.post(f"{server.url}/v1/adapters", json=wish)) == (403, "no_admin")
        assert code(httpx2.delete(f"{server.url}/v1/adapters/x")) == (403, "no_admin")
    with live(admin_key=ADMIN) as server:
        assert code(httpx2.post(f"{server.url}/v1/adapters", json=wish, headers=bearer(ADMIN))) == (403, "no_adapter_root")
    (tmp_path / "empty").mkdir()
    with live(admin_key=ADMIN, adapter_root=tmp_path) as server:
        answer = httpx2.post(f"{server.url}/v1/adapters", json={"name": "x", "folder": "empty"}, headers=bearer(ADMIN))
        assert code(answer) == (400, "adapter_unreadable")
