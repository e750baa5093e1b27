"""Threads that wait for each other spin for a short time only, unless the user says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from toka_engine.thread_waiting import SPIN_COUNT, with_bounded_spinning


def test_the_runtime_that_torch_loads_takes_the_spin_count() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment = with_bounded_spinning({**environment, "OMP_DISPLAY_ENV": "verbose"})
    found = subprocess.run(
        [sys.executable, "-c", "import torch"], env=environment, capture_output=True, text=True, check=True
    )
    assert f"GOMP_SPINCOUNT = '{SPIN_COUNT}'" in found.stderr


@pytest.mark.parametrize("chosen", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "5"}])
def test_what_the_user_has_chosen_stays(chosen: dict[str, str]) -> None:
    assert with_bounded_spinning({"A": "b", **chosen}) == {"A": "b", **chosen}
