"""Tests of the GPU path. Collected only when named (pytest tests/gpu); without a GPU they fail, they do not skip."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return None if any("gpu" in Path(argument).parts for argument in config.args) else True
