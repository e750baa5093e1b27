"""Asks engines that download their model how far they are.

Owns: that request, a GET of /readyz of pods that run and are not ready. An answer is shown, and decides nothing. Where
a NetworkPolicy forbids the requests, nothing is shown.
"""

from __future__ import annotations

from collections.abc import Callable

from toka_operator.asking import Asker, Engine, fetch
from toka_operator.downloads import parse_download
from toka_operator.observed import Download
from toka_operator.store import Key

INTERVAL_S = 3.0
_TIMEOUT_S = 2.0
_MAX_ANSWER_BYTES = 4096


class LoadingEngines(Asker[Download]):
    """The thread that asks them."""

    def __init__(
        self, on_change: Callable[[Key], None], is_leader: Callable[[], bool], interval_s: float = INTERVAL_S
    ) -> None:
        super().__init__("loading-engines", ask, on_change, is_leader, interval_s)


def ask(engine: Engine, timeout_s: float = _TIMEOUT_S) -> Download | None:
    """The download that an engine tells of, if it answers within `timeout_s`, all in all, and does."""
    return parse_download(fetch(engine, "/readyz", _MAX_ANSWER_BYTES, timeout_s))
