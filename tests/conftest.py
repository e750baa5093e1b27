"""Which tiers a plain `pytest tests/` collects: those that need no more than Python.

The others are collected when they are named on the command line (`pytest tests/cluster`, `scripts/test e2e`).
Where tests run in several processes, the long files begin first, and each process has its share of the cores.
Generated examples have no time limit: how long one takes says more of the machine than of us.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("toka", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("toka")

NUM_THREADS = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
"""The share of the cores that each of several test processes has. With more, threads wait for those of the other
process, which costs a sixth of the time."""
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = str(NUM_THREADS)  # before anything imports torch

for _name in [name for name in os.environ if name.startswith(("OTEL_", "TOKA_API_KEY", "TOKA_ORDINAL", "TOKA_PEERS"))]:
    del os.environ[_name]  # engines and the plugin would take them from the shell that runs the tests

_TIERS_TO_NAME = ("cluster", "e2e", "gpu", "fault", "codegen", "combinations", "clients", "browser")
_TESTS = Path(__file__).resolve().parent
LONG_FILES = (
    "api/test_greedy_policies.py",
    "api/test_greedy_parity.py",
    "cluster/test_api_faults.py",
    "cluster/test_lost_node.py",
    "model/test_torch_compile.py",
    "model/test_generation.py",
)
"""Those that take a fifth of their tier or more, or mostly wait: they begin first, each in a process of its own, or one
process would have nothing left to do while the other ends."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave a tier out unless the command line names it or something inside it."""
    for tier in _TIERS_TO_NAME:
        folder = _TESTS / tier
        if collection_path.is_relative_to(folder):
            named = [(config.invocation_params.dir / arg.split("::")[0]).resolve() for arg in config.args]
            return None if any(path.is_relative_to(folder) for path in named) else True
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of LONG_FILES first, in that order."""
    place = {_TESTS / name: index for index, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
