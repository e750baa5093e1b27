"""The interface between tensor-parallel ranks. `SingleRank` is a model on one device: it has nobody to talk to.

Every rank calls the same methods in the same order, and no rank may take a branch that another does not: what decides
about a call is a function of the step, the configuration and the agreed sizes.
"""

from __future__ import annotations

from typing import Protocol

import torch


class Ranks(Protocol):
    """The ranks that hold one model together, seen from one of them."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of all ranks' `x`, of one shape, as new memory.

        It is added up in rank order in float32 and rounded once, so that all ranks hold the same bits.
        """
        ...

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Return every rank's `x`, of one shape, in rank order: [size, *x.shape]."""
        ...

    def agree_min(self, value: int) -> int:
        """Return the smallest of all ranks' values."""
        ...


class SingleRank:
    """A Ranks of one. Callers that would have to move data ask for `size` first."""

    rank = 0
    size = 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x`."""
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x` as [1, *x.shape]."""
        return x[None]

    def agree_min(self, value: int) -> int:
        """Return `value`."""
        return value


def sum_in_order(parts: torch.Tensor) -> torch.Tensor:
    """Parts [size, ...] of all ranks -> their sum [...], in rank order in float32, rounded once."""
    total = parts[0].float() if parts.dtype != torch.float32 else parts[0].clone()
    for part in parts[1:]:
        total += part
    return total.to(parts.dtype)
