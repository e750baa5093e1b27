"""Fixtures of the supervisor's tests: the real supervisor with stand-in children."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.engine_process import EngineProcess

StartEngine = Callable[..., EngineProcess]


@pytest.fixture
def start_engine(tmp_path: Path) -> Iterator[StartEngine]:
    """start_engine(*arguments, **behaviour_by_role): an engine of stand-ins, ended after the test."""
    (tmp_path / "model").mkdir()
    with ExitStack() as stack:

        def start(*arguments: str, **behaviours: str) -> EngineProcess:
            env = {f"TOKA_TEST_{role.upper()}": behaviour for role, behaviour in behaviours.items()}
            engine = EngineProcess(
                tmp_path,
                f"model={tmp_path / 'model'}",
                *arguments,
                module="tests.unit.engine.standins.engine",
                env=env,
            )
            return stack.enter_context(engine)

        yield start
