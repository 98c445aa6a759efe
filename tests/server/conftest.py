"""The server's tests need the serve and test extras; without them they are left out, and said to be."""

from importlib.util import find_spec

import pytest

MISSING = [
    name for name in ("fastapi", "uvicorn", "httpx2", "openai", "llguidance", "prometheus_client") if find_spec(name) is None
]
collect_ignore_glob = ["test_*.py"] if MISSING else []


def pytest_report_header(config: pytest.Config) -> str:
    return f"tests of the server are left out: {', '.join(MISSING)} not installed" if MISSING else "tests of the server: in"
