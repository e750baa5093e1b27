"""`GET /ping`, `/livez`, `/readyz`, `/health`, `/metrics` and `/version`: what machines ask for, without a key."""

from __future__ import annotations

import msgspec

from toka_engine.server.service import Service
from toka_engine.version import __version__

PATHS = frozenset(("/ping", "/livez", "/readyz", "/health", "/metrics"))
VERSION_PATH = "/version"
PAGE_CONTENT_PATH = "/status"
"""The path that an open status page asks for again and again."""


class Version(msgspec.Struct):
    """The answer of /version."""

    version: str = __version__


class Pong(msgspec.Struct):
    """The answer of /ping, as the original's clients expect it."""

    message: str = "pong"


class Alive(msgspec.Struct):
    """The answer of /livez."""

    alive: bool = True


class Readiness(msgspec.Struct):
    """The answer of /readyz: why the engine takes no requests, or that it does."""

    ready: bool
    phase: str
    detail: str


def check_readiness(service: Service) -> Readiness:
    """Return the state of the engine, as far as this process sees it."""
    health = service.health
    return Readiness(health.is_ready, health.phase.value, health.explain())
