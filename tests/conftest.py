"""Which tiers a plain `pytest tests/` collects: those without cluster, GPU or rights to inject faults.

The others are collected when they are named on the command line (`pytest tests/cluster`, `scripts/test e2e`).
Generated examples have no time limit: how long one takes says more of the machine than of us.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("toka", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("toka")

_TIERS_TO_NAME = ("cluster", "e2e", "gpu", "fault")
_TESTS = Path(__file__).resolve().parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave a tier out unless the command line names it or something inside it."""
    for tier in _TIERS_TO_NAME:
        folder = _TESTS / tier
        if collection_path.is_relative_to(folder):
            named = [(config.invocation_params.dir / arg.split("::")[0]).resolve() for arg in config.args]
            return None if any(path.is_relative_to(folder) for path in named) else True
    return None
