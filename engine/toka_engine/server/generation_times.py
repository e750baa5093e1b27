"""The moments of a request that its endpoint does not see by itself."""

from __future__ import annotations

import time


class GenerationTimes:
    """The moments at which a request went to the managers, and at which the first of its prompts was admitted."""

    __slots__ = ("admitted_s", "submitted_s")

    def __init__(self) -> None:
        self.submitted_s = time.monotonic()
        self.admitted_s: float | None = None
