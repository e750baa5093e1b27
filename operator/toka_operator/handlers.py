"""Every kopf decorator of the program. The bodies only hand on what kopf saw.

May not decide, read or write anything: kopf is the runtime that watches TokaDeployments, no more.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import kopf

from toka_operator import __version__
from toka_operator.runtime import Runtime
from toka_operator.settings import GROUP, PLURAL, VERSION

logger = logging.getLogger("toka.handlers")


class EndlessBackoffs:
    """Seconds before each further try of a request of kopf's. Its own list ends, and the operator with it, after a
    minute of 5xx (or of 403, which an API server answers until it has read its roles)."""

    def __iter__(self) -> Iterator[float]:
        return itertools.chain((0.2, 0.5, 1.0, 2.0), itertools.repeat(5.0))


def configure(settings: kopf.OperatorSettings) -> None:
    """Nothing but one watch, which never gives up."""
    settings.posting.enabled = False
    settings.posting.loggers = False
    settings.scanning.disabled = True
    settings.watching.server_timeout = 270
    settings.watching.client_timeout = 300
    settings.watching.connect_timeout = 10
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 10
    settings.networking.error_backoffs = EndlessBackoffs()


def register(registry: kopf.OperatorRegistry, runtime: Runtime) -> None:
    """Puts our handlers into kopf's registry. Only raw events: anything else would annotate or finalize
    the objects."""

    @kopf.on.startup(registry=registry)
    async def start(settings: kopf.OperatorSettings, **_: Any) -> None:
        configure(settings)
        logger.info("event=started version=%s", __version__)

    @kopf.on.login(registry=registry)
    async def log_in(**kwargs: Any) -> kopf.ConnectionInfo | None:
        return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)
    async def note(event: kopf.RawEvent, **_: Any) -> None:
        runtime.note(event["type"], dict(event["object"]))
