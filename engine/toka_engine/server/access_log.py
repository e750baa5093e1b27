"""Logs a line per request, as key=value: its id, how it ended, what it cost. Text, API keys and queries of URLs are
never logged.
"""

from __future__ import annotations

import logging
import time

from toka_engine.server.endpoints.probes import PAGE_CONTENT_PATH, PATHS
from toka_engine.server.exchange import Exchange

logger = logging.getLogger("toka.server.access")

_FREQUENT = PATHS | {PAGE_CONTENT_PATH}


def log_request(exchange: Exchange) -> None:
    """Log one request that has ended; those that come every few seconds, at level DEBUG."""
    level = logging.DEBUG if exchange.path in _FREQUENT else logging.INFO
    if not logger.isEnabledFor(level):
        return
    fields = [
        f"event=request request_id={exchange.request_id.decode()} method={exchange.method[:20]}",
        f"path={exchange.path[:200]!r} status={exchange.status}",
        f"seconds={time.monotonic() - exchange.started_s:.3f}",
    ]
    if exchange.key is not None:
        fields.append(f"key={exchange.key.name}")
    if exchange.model:
        fields.append(f"model={exchange.model!r}")
    if exchange.first_token_s is not None:
        fields.append(f"first_token_s={exchange.first_token_s:.3f}")
    if (usage := exchange.usage) is not None:
        fields.append(f"prompt_tokens={usage.prompt_tokens} completion_tokens={usage.completion_tokens}")
    logger.log(level, "%s", " ".join(fields))
