"""The residual stream: an embedding starts it, and each norm adds the block before to it, then normalises it.

The adds are fused into the norms, so a block's output travels to the next norm before it is in the stream. For one row,
where the device has GEMV kernels, the add and the norm are fused into the GEMVs instead (see `linear`).

A pipeline stage that is not the last one ends with the add alone, and the next one begins with the sum.

On several ranks a block's output is each rank's part of a sum, and so is an embedding, of which a rank has the rows of
its own tokens: the norm adds the parts up first. The stream itself is the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from toka_engine.model.linear import Activation, DeferredAdd, DeferredNorm, NormedRows
from toka_engine.model.ops import BegunSum, Fp8Ops, Ops
from toka_engine.model.ranks import Ranks


class Embedding:
    """The vectors of token ids."""

    def __init__(self, name: str, weight: torch.Tensor | None, first: int | None) -> None:
        """`weight` has the rows of the tokens from `first` on; None: of all. Only the first stage holds it."""
        self.name = name
        self.weight = weight  # [tokens, width]
        self._first = first

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [n] int32 -> [n, width], new memory: the stream grows in it. Zeros for other ranks' tokens."""
        assert self.weight is not None, "only the first stage looks tokens up"
        if self._first is None:
            return F.embedding(ids, self.weight)
        local, num_tokens = ids - self._first, self.weight.shape[0]
        is_elsewhere = (local < 0) | (local >= num_tokens)
        return F.embedding(local.clamp(0, num_tokens - 1), self.weight).masked_fill_(is_elsewhere[:, None], 0)


class Norm:
    """RMSNorm of the residual stream (Zhang and Sennrich 2019)."""

    def __init__(self, ops: Ops, weight: torch.Tensor, eps: float, ranks: Ranks) -> None:
        self.weight, self._eps = weight, eps
        fused = ops.all_reduce_add_rms_norm if ranks.size > 1 else None
        self._rms_norm, self._add_rms_norm = ops.rms_norm, fused or ops.add_rms_norm
        self._all_reduce = ranks.all_reduce if ranks.size > 1 and fused is None else None
        self._is_fused = fused is not None
        self._can_defer = ops.gemv is not None and ranks.size == 1
        self._norm: Callable[[torch.Tensor | BegunSum | None, torch.Tensor], Activation] = self._compute
        if ops.fp8 is not None and ranks.size == 1:
            self._norm = partial(self._defer, ops, ops.fp8)

    def __call__(self, x: Activation, residual: torch.Tensor | None) -> tuple[Activation, torch.Tensor]:
        """Add a block's output `x` [n, width] to the stream [n, width], in place; return its norm, and the stream.

        Without a stream, `x` becomes it.
        """
        pending, residual = self._enter(x, residual)
        # In this order: where there are no kernels, a trace must not ask for the rows.
        if self._can_defer and pending is None and residual.shape[0] == 1:
            return DeferredNorm(residual, self.weight, self._eps), residual
        return self._norm(pending, residual), residual

    def finish(self, x: Activation, residual: torch.Tensor | None) -> torch.Tensor:
        """The norm behind the last block: as a call, but always computed here, [n, width]."""
        return self._compute(*self._enter(x, residual))

    def _compute(self, pending: torch.Tensor | BegunSum | None, residual: torch.Tensor) -> torch.Tensor:
        if pending is None:
            return self._rms_norm(residual, self.weight, self._eps)
        if isinstance(pending, BegunSum):
            return pending.add_rms_norm(residual, self.weight, self._eps)
        return self._add_rms_norm(pending, residual, self.weight, self._eps)

    def _defer(
        self, ops: Ops, fp8: Fp8Ops, pending: torch.Tensor | BegunSum | None, residual: torch.Tensor
    ) -> NormedRows:
        assert not isinstance(pending, BegunSum), "one rank sums nothing up"
        return NormedRows(ops, fp8, pending, residual, self.weight, self._eps)

    def _enter(
        self, x: Activation, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor | BegunSum | None, torch.Tensor]:
        """Return what is still to be added (None: nothing) and the stream, both cut to the wanted rows."""
        pending, residual = _settle(x, residual)
        if pending is None or isinstance(pending, BegunSum):
            assert residual is not None, "only an embedding starts a stream"
            return pending, residual
        x = pending if self._all_reduce is None else self._all_reduce(pending)
        if self._is_fused and residual is None:
            residual = torch.zeros_like(x)  # `x` is a part of the sum that becomes the stream
        return (None, x) if residual is None else (x, residual)


class StreamEnd:
    """The end of the stream in a stage that hands it over to the next one."""

    def __init__(self, ops: Ops, weight: torch.Tensor, ranks: Ranks) -> None:
        """`weight` [width] is of no matter: where the sum of ranks is one kernel with a norm, it is that norm's."""
        self._fused = ops.all_reduce_add_rms_norm if ranks.size > 1 else None
        self._all_reduce = ranks.all_reduce if ranks.size > 1 else None
        self._weight = weight

    def finish(self, x: Activation, residual: torch.Tensor | None) -> torch.Tensor:
        """Add the last block's output `x` [n, width] to the stream, in place, and return it, the same on all ranks."""
        pending, residual = _settle(x, residual)
        assert residual is not None, "a stage has layers"
        if pending is None:
            return residual
        assert not isinstance(pending, BegunSum), "GPUs have either pipeline stages or several ranks"
        if self._fused is not None:
            self._fused(pending, residual, self._weight, 1.0)
            return residual
        return residual.add_(pending if self._all_reduce is None else self._all_reduce(pending))


def _settle(x: Activation, residual: torch.Tensor | None) -> tuple[torch.Tensor | BegunSum | None, torch.Tensor | None]:
    """Return what is still to be added (None: nothing) and the stream (None: there is none yet), of the wanted rows."""
    if isinstance(x, DeferredAdd):
        assert residual is not None, "only an embedding starts a stream"
        if x.wanted is not None:
            residual = residual.index_select(0, x.wanted)
        if x.gemv is not None:
            x.gemv.add(x.x, residual)
            return None, residual
        x = x.x
    if not isinstance(x, torch.Tensor | BegunSum):
        raise AssertionError("a norm reads a block's output, not another norm")
    return x, residual
