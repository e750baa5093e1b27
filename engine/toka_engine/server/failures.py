"""Answers a request that has failed: the one place where an exception becomes an answer."""

from __future__ import annotations

import logging
import traceback

from toka_engine.server.errors import ApiError, ClientGoneError, internal, is_full, no_room
from toka_engine.server.exchange import Exchange
from toka_engine.server.metrics import Metrics

logger = logging.getLogger("toka.server")

_CLIENT_GONE = 499
"""The status that metrics and log show for a client that closed its connection before its answer, as proxies do."""
_LOGGED_FRAMES = 30
"""The innermost frames of a defect's traceback that are logged: endless recursion has a thousand."""


async def answer_failure(exchange: Exchange, error: Exception, metrics: Metrics) -> None:
    """Answer `error`, once, however often it is raised on."""
    if exchange.failure is error:
        return
    exchange.failure = error
    exchange.failure_code = getattr(error, "code", None) or ""
    if isinstance(error, ApiError):
        await exchange.fail(error)
    elif isinstance(error, ClientGoneError):
        exchange.status = exchange.status or _CLIENT_GONE
        metrics.cancelled.inc()
    elif is_full(error):
        await exchange.fail(no_room("The disk of `data_dir` is full."))
    else:
        _log_defect(exchange, error)
        await exchange.fail(internal())


def frames_of(error: Exception) -> str:
    """Return where `error` comes from, for the log, without its message: that may quote the request."""
    return "".join(traceback.format_tb(error.__traceback__, -_LOGGED_FRAMES)).rstrip()


def _log_defect(exchange: Exchange, error: Exception) -> None:
    logger.error(
        "event=request_failed request_id=%s path=%r error=%s\n%s",
        exchange.request_id.decode(),
        exchange.path[:200],
        type(error).__name__,
        frames_of(error),
    )
