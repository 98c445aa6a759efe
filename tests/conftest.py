"""What every test gets: two torch threads, a fixed seed, no deadlines, no model hub, and no gpu tests without CUDA."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# A busy machine is no fault of the code: no test fails for its time. What CI's own profile says (no chance) stays.
settings.register_profile("tessella", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tessella")


def pytest_configure(config: pytest.Config) -> None:
    # Two workers share two cores in `make test`; more threads than cores make small matrices slower, not faster: on a busy
    # machine two threads wait for each other, and a test of 0.6 s took 21. Whoever says OMP_NUM_THREADS is believed.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1 if hasattr(config, "workerinput") else 2)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A word that looks like a name on a hub is looked up in the cache alone; test_checkpoint_hub.py serves one of its own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
