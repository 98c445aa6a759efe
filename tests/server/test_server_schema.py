"""schemathesis reads our own OpenAPI and sends what it allows and what it forbids: the server does what its page says."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from stand_in import NAME, Live, ScriptedEngine, live

schemathesis = pytest.importorskip("schemathesis")

ADMIN = "a" * 20


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(ScriptedEngine(), default_max_tokens=4, admin_key=ADMIN) as running:
        yield running


@pytest.fixture(scope="module")
def api(server: Live) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


# schemathesis' own pytest plugin does not know pytest 9.2's nodes, so its operations are walked through by hand.
OPERATIONS = [
    *("GET /health", "GET /ready", "GET /metrics", "GET /v1/models", "GET /v1/models/{name}"),
    *("POST /v1/chat/completions", "POST /v1/completions", "POST /v1/adapters", "DELETE /v1/adapters/{name}"),
]


def test_every_route_of_the_page_is_tried(api: Any) -> None:
    assert sorted(one.ok().label for one in api.get_all_operations()) == sorted(OPERATIONS)


def run(api: Any, label: str, mode: str, excluded: Sequence[Any] = ()) -> None:
    method, _, path = label.partition(" ")
    headers = {"authorization": f"Bearer {ADMIN}"} if "adapters" in path else {}
    strategy = api[path][method].as_strategy(generation_mode=schemathesis.GenerationMode(mode))

    @settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(strategy)
    def try_one(case: Any) -> None:
        if mode == "positive" and isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = NAME  # a name that is served cannot be guessed from the page
        case.call_and_validate(headers=headers, excluded_checks=list(excluded))

    try_one()


@pytest.mark.parametrize("label", OPERATIONS)
def test_what_the_page_allows_is_answered_as_it_says(api: Any, label: str) -> None:
    # Fields that do not go together, and turns out of order, are more than a schema can forbid.
    schemathesis.checks.load_all_checks()
    acceptance = schemathesis.checks.CHECKS.get_one("positive_data_acceptance")
    excluded = [acceptance] if "completions" in label or "adapters" in label else []
    run(api, label, "positive", excluded)


@pytest.mark.parametrize("label", [label for label in OPERATIONS if label.startswith("POST")])
def test_what_the_page_forbids_is_refused(api: Any, label: str) -> None:
    run(api, label, "negative")
