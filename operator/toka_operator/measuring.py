"""Asks the engines of a rollout with a canary for their figures.

Owns: that request, a GET of /metrics of the canary and of old pods that it is compared with, while it is watched. Where
a NetworkPolicy forbids the requests, the canary is not judged, and so does not pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from toka_operator.asking import Asker, Engine, fetch
from toka_operator.figures import Figures, parse_figures
from toka_operator.store import Key

INTERVAL_S = 2.0
_MAX_ANSWER_BYTES = 1_000_000


class MeasuredEngines(Asker[Figures]):
    """The thread that asks them."""

    def __init__(
        self, on_change: Callable[[Key], None], is_leader: Callable[[], bool], interval_s: float = INTERVAL_S
    ) -> None:
        super().__init__("measured-engines", read_figures, on_change, is_leader, interval_s)


def read_figures(engine: Engine) -> Figures | None:
    """The figures of an engine, if it answers."""
    began = time.time()
    return parse_figures(fetch(engine, "/metrics", _MAX_ANSWER_BYTES), began)
