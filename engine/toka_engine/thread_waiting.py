"""Chooses how long the threads of a step spin while they wait for each other, before they sleep.

The OpenMP runtime that torch ships (libgomp) reads it when it is loaded, so it stands in the environment of every
process that the supervisor spawns. By itself it spins for milliseconds: a thread that waits for one which has lost its
core to another process then keeps the core on which that one could go on, and uses up the CPU quota of a container.
"""

from __future__ import annotations

from collections.abc import Mapping

SPIN_COUNT = 2000
"""Less than 0.1 ms, about what a thread takes to go to sleep and to wake up. docs/tuning.md has what was measured."""
_CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def with_bounded_spinning(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` with the length of spinning, unless its user has chosen that."""
    if any(name in environment for name in _CHOICES):
        return dict(environment)
    return {**environment, "GOMP_SPINCOUNT": str(SPIN_COUNT)}
