"""`GET /ping`, `/livez`, `/readyz`, `/health`, `/metrics`, `/version`, `/load`: what machines ask for, keyless."""

from __future__ import annotations

import msgspec

from toka_engine.server.service import Service
from toka_engine.version import __version__

PATHS = frozenset(("/ping", "/livez", "/readyz", "/health", "/metrics"))
VERSION_PATH = "/version"
LOAD_PATH = "/load"
PAGE_CONTENT_PATH = "/status"
"""The path that an open status page asks for again and again."""


class Version(msgspec.Struct):
    """The answer of /version."""

    version: str = __version__


class Load(msgspec.Struct):
    """The answer of /load, as vLLM gives it: the generating requests that are not answered yet."""

    server_load: int


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
