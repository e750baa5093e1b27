"""The place where GPU ranks of one host exchange bytes while they start: a file in the folder that the start made.

Nothing listens. A rank that ends is noticed by the supervisor; the time-out is for one that neither answers nor ends.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from toka_engine.errors import PeerClosedError
from toka_engine.model.meeting import open_meeting

_TIMEOUT = timedelta(minutes=10)
"""Ranks load their weights at their own speed, and compile kernels that an image lacks."""


class Rendezvous:
    """One rank's end. All ranks call the same methods in the same order."""

    def __init__(self, meeting: Path, rank: int, size: int) -> None:
        """Use the file `meeting`, which no earlier start has used. Raises StorageError."""
        self.rank, self.size = rank, size
        self.store: Any = open_meeting(meeting, rank, size)
        self.store.set_timeout(_TIMEOUT)
        self._turn = 0

    def gather(self, data: bytes) -> list[bytes]:
        """Return every rank's `data` in rank order, once all have called it. Raises PeerClosedError."""
        self._turn += 1
        try:
            self.store.set(f"{self._turn}/{self.rank}", data)
            return [bytes(self.store.get(f"{self._turn}/{rank}")) for rank in range(self.size)]
        except RuntimeError as error:  # DistStoreError among them
            reason = str(error).splitlines()[0]
            raise PeerClosedError(f"rank {self.rank} of {self.size} has lost another one: {reason}") from error

    def agree_min(self, value: int) -> int:
        """Return the smallest of all ranks' values. Raises PeerClosedError."""
        return min(int(data) for data in self.gather(str(value).encode()))
