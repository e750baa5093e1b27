"""The residual stream: an embedding starts it, and each norm adds the block before to it, then normalises it.

The adds are fused into the norms, so a block's output travels to the next norm before it is in the stream. For one row,
where the device has GEMV kernels, the add and the norm are fused into the GEMVs instead (see `linear`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from toka_engine.model.linear import Activation, DeferredAdd, DeferredNorm
from toka_engine.model.ops import Ops


class Embedding:
    """The vectors of token ids."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight  # [vocab, width]

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [n] int32 -> [n, width], new memory: the stream grows in it."""
        return F.embedding(ids, self.weight)


class Norm:
    """RMSNorm of the residual stream (Zhang and Sennrich 2019)."""

    def __init__(self, ops: Ops, weight: torch.Tensor, eps: float) -> None:
        self.weight, self._eps = weight, eps
        self._rms_norm, self._add_rms_norm = ops.rms_norm, ops.add_rms_norm
        self._can_defer = ops.single_row is not None

    def __call__(self, x: Activation, residual: torch.Tensor | None) -> tuple[Activation, torch.Tensor]:
        """Add a block's output `x` [n, width] to the stream [n, width], in place; return its norm, and the stream.

        Without a stream, `x` becomes it.
        """
        pending, residual = _enter(x, residual)
        # In this order: where there are no kernels, a trace must not ask for the rows.
        if self._can_defer and pending is None and residual.shape[0] == 1:
            return DeferredNorm(residual, self.weight, self._eps), residual
        return self._compute(pending, residual), residual

    def finish(self, x: Activation, residual: torch.Tensor | None) -> torch.Tensor:
        """The norm behind the last block: as a call, but always computed here, [n, width]."""
        return self._compute(*_enter(x, residual))

    def _compute(self, pending: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
        if pending is None:
            return self._rms_norm(residual, self.weight, self._eps)
        return self._add_rms_norm(pending, residual, self.weight, self._eps)


def _enter(x: Activation, residual: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor]:
    """What is still to be added to the stream, None if a GEMV has done it, and the stream, cut to the wanted rows."""
    match x:
        case DeferredNorm():
            raise AssertionError("a norm reads a block's output, not another norm")
        case DeferredAdd():
            assert residual is not None, "only an embedding starts a stream"
            if x.wanted is not None:
                residual = residual.index_select(0, x.wanted)
            if x.gemv is None:
                return x.x, residual
            x.gemv.add(x.x, residual)
            return None, residual
        case _:
            return (None, x) if residual is None else (x, residual)
