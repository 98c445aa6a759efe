"""schemathesis reads our own OpenAPI and sends what it allows and what it forbids: the server does what its page says."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from stand_in import NAME, Live, ScriptedEngine, live

schemathesis = pytest.importorskip("schemathesis")

ADMIN = "a" * 20
FOLDER = "food"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root: Path = tmp_path_factory.mktemp("adapters")
    (root / FOLDER).mkdir()
    (root / FOLDER / "adapter_config.json").write_text("{}")
    with live(ScriptedEngine(), default_max_tokens=4, admin_key=ADMIN, adapter_root=root) as running:
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


# What a page cannot tell: a name that is served, a folder that is there.
KNOWN = {"model": NAME, "folder": FOLDER}
HELLO = {"messages": [{"role": "user", "content": "hello"}]}  # turns in order, without pictures: what a schema can hardly make
MANY = 15  # of the 20 that are asked for: fewer would be no trial


def run(api: Any, label: str, mode: str, excluded: Sequence[Any] = (), known: Mapping[str, Any] = KNOWN) -> Counter[int]:
    """Statuses of the answers, each of which schemathesis has held against the page. known: put in place of what was made."""
    method, _, path = label.partition(" ")
    headers = {"authorization": f"Bearer {ADMIN}"} if "adapters" in path else {}
    strategy = api[path][method].as_strategy(generation_mode=schemathesis.GenerationMode(mode))
    statuses: Counter[int] = Counter()

    @settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(strategy)
    def try_one(case: Any) -> None:
        if mode == "positive":
            if isinstance(case.body, dict):
                case.body.update((field, value) for field, value in known.items() if field in case.body)
            case.path_parameters.update((field, NAME) for field in case.path_parameters)
        statuses[case.call_and_validate(headers=headers, excluded_checks=list(excluded)).status_code] += 1

    try_one()
    return statuses


@pytest.mark.parametrize("label", OPERATIONS)
def test_what_the_page_allows_is_answered_as_it_says(api: Any, label: str) -> None:
    # Fields that do not go together, and turns out of order, are more than a schema can forbid.
    schemathesis.checks.load_all_checks()
    acceptance = schemathesis.checks.CHECKS.get_one("positive_data_acceptance")
    excluded = [acceptance] if "completions" in label or "adapters" in label else []
    statuses = run(api, label, "positive", excluded)
    if "chat" in label:
        statuses += run(api, label, "positive", excluded, {**KNOWN, **HELLO})
    assert label.startswith("DELETE") or any(status < 300 for status in statuses), statuses  # its answers were seen


@pytest.mark.parametrize("label", [label for label in OPERATIONS if label.startswith("POST")])
def test_what_the_page_forbids_is_refused(api: Any, label: str) -> None:
    statuses = run(api, label, "negative")
    assert set(statuses) <= {400, 415} and statuses[400] >= MANY, statuses
