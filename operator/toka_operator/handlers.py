"""Every kopf decorator of the program: start-up, clean-up and login. The bodies only hand on.

kopf runs the process: it calls these handlers, ends on SIGTERM, and tells when a part of it fails. It watches nothing:
its watch may end while the process lives, so `watches` sees TokaDeployments as it sees their children.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import kopf

from toka_operator import __version__
from toka_operator.runtime import Runtime

logger = logging.getLogger("toka.handlers")

LOGIN_PAUSE_S = 5.0
LOGIN_LIFE_S = 3600.0


class EndlessBackoffs:
    """Seconds before each further try of a request of kopf's. Its own list ends, and the operator with it, after a
    minute of 5xx (or of 403, which an API server answers until it has read its roles)."""

    def __iter__(self) -> Iterator[float]:
        return itertools.chain((0.2, 0.5, 1.0, 2.0), itertools.repeat(5.0))


class Logins:
    """kopf's credentials, for the discovery that it makes when it starts.

    kopf ends the process when a refused token comes again, though it may be right a moment later. So each login has
    an expiry of its own, which makes it another to kopf, and a repeated one waits.
    """

    def __init__(self) -> None:
        self._num_logins = 0

    async def log_in(self, **kwargs: Any) -> kopf.ConnectionInfo | None:
        if self._num_logins:
            await asyncio.sleep(LOGIN_PAUSE_S)
        self._num_logins += 1
        expiry = datetime.now(UTC) + timedelta(seconds=LOGIN_LIFE_S)
        found = kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)
        return None if found is None else kopf.ConnectionInfo(**{**vars(found), "expiration": expiry})


def configure(settings: kopf.OperatorSettings) -> None:
    """Switches off whatever kopf would watch or post, and lets its requests never give up."""
    settings.posting.enabled = False
    settings.posting.loggers = False
    settings.scanning.disabled = True
    settings.networking.request_timeout = 15
    settings.networking.connect_timeout = 5
    settings.networking.error_backoffs = EndlessBackoffs()


def register(registry: kopf.OperatorRegistry, runtime: Runtime) -> None:
    """Puts our handlers into kopf's registry. None is of a resource: kopf would watch, annotate or finalize it."""
    logins = Logins()

    @kopf.on.startup(registry=registry)
    async def start(settings: kopf.OperatorSettings, **_: Any) -> None:
        configure(settings)
        runtime.start()
        logger.info("event=started version=%s health_port=%d", __version__, runtime.health_port)

    @kopf.on.login(registry=registry)
    async def log_in(**kwargs: Any) -> kopf.ConnectionInfo | None:
        return await logins.log_in(**kwargs)

    @kopf.on.cleanup(registry=registry)
    async def stop(**_: Any) -> None:
        await asyncio.to_thread(runtime.stop)
