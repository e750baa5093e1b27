"""Marks of parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def rest_is_slow(in_every_run: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """Return `values` for parametrize: those that are not `in_every_run` are left to `scripts/test slow`.

    A value is that of one name, or the tuple of those of several names.
    """
    values = list(values)
    assert all(value in values for value in in_every_run), in_every_run
    return [
        value
        if value in in_every_run
        else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
        for value in values
    ]
