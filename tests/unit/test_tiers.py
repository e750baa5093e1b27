"""The tiers' own settings, tests/conftest.py."""

from __future__ import annotations

from tests.conftest import LONG_FILES
from tests.engine_process import ROOT


def test_each_of_the_long_files_is_there() -> None:
    """A name that no file has any more would have no effect."""
    assert [name for name in LONG_FILES if not (ROOT / "tests" / name).is_file()] == []
