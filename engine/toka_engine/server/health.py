"""The phase of this process: starting, serving, draining, refusing or failing. It sees only this process's part of the
engine.
"""

from __future__ import annotations

from enum import Enum

from toka_engine.server.errors import unavailable


class Phase(Enum):
    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    """Not ready, but requests are still accepted: a Service's endpoints take time to follow."""
    REFUSING = "refusing"
    """Running requests are finished, new ones refused."""
    FAILING = "failing"


class Health:
    """The phase of the process; it only moves forward, FAILING is final."""

    def __init__(self) -> None:
        self.phase = Phase.STARTING
        self.detail = "loading the tokenizer"
        self.silent_process = ""
        """Another process that does not answer at the moment; not ready until it does."""

    @property
    def is_ready(self) -> bool:
        return self.phase is Phase.SERVING and not self.silent_process

    def move(self, phase: Phase, detail: str = "") -> None:
        """Enter `phase`, unless the process is failing or past it."""
        order = list(Phase)
        if order.index(phase) >= order.index(self.phase):
            self.phase, self.detail = phase, detail

    def check_serving(self) -> None:
        """Raise a 503 unless requests are taken."""
        if self.phase in (Phase.SERVING, Phase.DRAINING):
            return
        reason = f"{self.phase.value}: {self.detail}" if self.detail else self.phase.value
        raise unavailable(f"The engine takes no requests: {reason}.")

    def explain(self) -> str:
        """Return what the process waits for, or why it fails."""
        return f"{self.silent_process} does not answer" if self.silent_process else self.detail
