"""Every kopf decorator of the program. The bodies only hand on what kopf saw.

May not decide, read or write anything: kopf is the runtime that watches TokaDeployments, no more.
"""

from __future__ import annotations

import logging
from typing import Any

import kopf

from toka_operator import __version__
from toka_operator.runtime import Runtime
from toka_operator.settings import GROUP, PLURAL, VERSION

logger = logging.getLogger("toka.handlers")


def register(registry: kopf.OperatorRegistry, runtime: Runtime) -> None:
    """Puts our handlers into kopf's registry. Only raw events: anything else would annotate or finalize
    the objects."""

    @kopf.on.startup(registry=registry)
    async def configure(settings: kopf.OperatorSettings, **_: Any) -> None:
        settings.posting.enabled = False
        settings.posting.loggers = False
        settings.scanning.disabled = True
        settings.watching.server_timeout = 270
        settings.watching.client_timeout = 300
        settings.watching.connect_timeout = 10
        settings.networking.request_timeout = 30
        settings.networking.connect_timeout = 10
        logger.info("event=started version=%s", __version__)

    @kopf.on.login(registry=registry)
    async def log_in(**kwargs: Any) -> kopf.ConnectionInfo | None:
        return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)
    async def note(event: kopf.RawEvent, **_: Any) -> None:
        runtime.note(event["type"], dict(event["object"]))
