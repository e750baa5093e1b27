"""Tensor-parallel ranks as threads of one process: a ranks.Ranks without processes or sockets."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from toka_engine.model.ranks import Ranks, sum_in_order

Result = TypeVar("Result")
TIMEOUT_S = 120.0


class ThreadRanks:
    """One rank. `parts` and `barrier` belong to all of them."""

    def __init__(self, rank: int, parts: list[torch.Tensor], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(parts)
        self._parts, self._barrier = parts, barrier

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        self._parts[self.rank] = x
        self._barrier.wait(TIMEOUT_S)
        assert len({(part.shape, part.dtype) for part in self._parts}) == 1, "ranks took different branches"
        gathered = torch.stack(self._parts)
        self._barrier.wait(TIMEOUT_S)
        return gathered

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return sum_in_order(self.all_gather(x))

    def agree_min(self, value: int) -> int:
        return int(self.all_gather(torch.tensor(value)).min())


def run_ranks(size: int, work: Callable[[Ranks], Result]) -> list[Result]:
    """Run `work` as each of `size` ranks; what each returns, in rank order. Raises the first rank's own error."""
    barrier = threading.Barrier(size)
    parts = [torch.empty(0)] * size

    def run(rank: int) -> Result:
        try:
            return work(ThreadRanks(rank, parts, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    errors.sort(key=lambda error: isinstance(error, threading.BrokenBarrierError))
    if errors:
        raise errors[0]
    return [future.result() for future in futures]
