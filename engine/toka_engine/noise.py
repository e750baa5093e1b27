"""Chooses the seed of an engine's noise, from which requests without a seed of their own are sampled.

Without the key `seed` it comes from the operating system's entropy, so that no two engines or starts repeat each
other's samples. The supervisor draws it once, before any process starts, and each process is told its replica's in
`Start`: the ranks of a replica compute one batch together and must draw the same tokens, two replicas must not.
"""

from __future__ import annotations

import hashlib
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


def for_replica(config: EngineConfig, number: int) -> EngineConfig:
    """Return the settled `config` of replica `number` of an engine: the first one's seed is the engine's own."""
    if number == 0:
        return config
    digest = hashlib.sha256(f"{settled_seed(config)} {number}".encode()).digest()
    seed = int.from_bytes(digest[:8], "little") % 2**_SEED_BITS
    return msgspec.structs.replace(config, seed=seed)


def settled_seed(config: EngineConfig) -> int:
    """Return the seed of `config`, which `settle_seed` must have made: drawing one here would part the ranks."""
    if config.seed is None:
        raise AssertionError("the engine's seed was not settled before its processes started")
    return config.seed
