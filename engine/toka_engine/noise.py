"""Chooses the seed of an engine's noise, from which requests without a seed of their own are sampled.

Without the key `seed` it comes from the operating system's entropy, so that no two engines, replicas or starts repeat
each other's samples. It is drawn once for each replica, by the supervisor before any process starts, and reaches every
process in `Start`: ranks that compute one batch together must draw the same tokens. Whoever starts several replicas
calls `settle_seed` once for each.
"""

from __future__ import annotations

import secrets

import msgspec

from toka_engine.config import EngineConfig

_SEED_BITS = 63
"""The bound of the key `seed`."""


def settle_seed(config: EngineConfig) -> EngineConfig:
    """Return `config` with a seed: its own, or a new one from the operating system's entropy."""
    if config.seed is not None:
        return config
    return msgspec.structs.replace(config, seed=secrets.randbits(_SEED_BITS))


def settled_seed(config: EngineConfig) -> int:
    """Return the seed of `config`, which `settle_seed` must have made: drawing one here would part the ranks."""
    if config.seed is None:
        raise AssertionError("the engine's seed was not settled before its processes started")
    return config.seed
