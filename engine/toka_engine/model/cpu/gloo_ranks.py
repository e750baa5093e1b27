"""Tensor-parallel ranks on CPUs: processes of one machine, over gloo on the loopback interface.

The ranks find each other through a file in a folder that the supervisor made for this start, never through a listener
that others can reach. Sums are made of gathered parts: the order in which gloo itself adds depends on how it cuts a
tensor, and a seeded request must give the same text whatever else runs.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from toka_engine.errors import DeviceUnavailableError, PeerClosedError
from toka_engine.model.meeting import open_meeting
from toka_engine.model.ranks import sum_in_order

_gloo: Any = torch.distributed
"""Untyped: torch's stubs leave out what decides on which interface gloo listens."""
_LOOPBACK = "127.0.0.1"
_TIMEOUT = timedelta(minutes=10)
"""For a peer that neither answers nor ends. Ends are noticed at once, and the supervisor notices a stalled process."""


class GlooRanks:
    """A ranks.Ranks of processes."""

    def __init__(self, meeting: Path, rank: int, size: int) -> None:
        """Meet the other ranks by the file `meeting`, which no earlier start has used.

        Raises PeerClosedError, StorageError, DeviceUnavailableError (there is no loopback interface).
        """
        self.rank, self.size = rank, size
        options = _gloo.ProcessGroupGloo._Options()
        options._devices = [_make_device()]
        options._timeout = _TIMEOUT
        store = open_meeting(meeting, rank, size)
        try:
            self._group = _gloo.ProcessGroupGloo(store, rank, size, options)
        except RuntimeError as error:
            raise self._describe(error) from error

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """See ranks.Ranks."""
        return sum_in_order(self.all_gather(x))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """See ranks.Ranks."""
        parts = x.new_empty((self.size, *x.shape))
        if x.numel():
            try:
                # Bytes: gloo need not know the type.
                self._group._allgather_base(_as_bytes(parts), _as_bytes(x)).wait()
            except RuntimeError as error:
                raise self._describe(error) from error
        return parts

    def agree_min(self, value: int) -> int:
        """See ranks.Ranks."""
        return int(self.all_gather(torch.tensor([value])).min())

    def _describe(self, error: RuntimeError) -> PeerClosedError:
        reason = str(error).splitlines()[0]
        return PeerClosedError(f"rank {self.rank} of {self.size} has lost another one: {reason}")


def _make_device() -> Any:
    try:
        return _gloo.ProcessGroupGloo.create_device(hostname=_LOOPBACK)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise DeviceUnavailableError(
            f"ranks on CPUs talk over the loopback interface, and {_LOOPBACK} cannot be used: {reason}"
        ) from error


def _as_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(-1).view(torch.uint8)
