"""The table of operators that models and layers are made of, beside the attention interface. Each backend has one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

Gemm: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""The GEMM of one linear layer: [rows, in_features] -> [rows, out_features]."""
QuantisedRows: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Rows of 8-bit floats (e4m3) [rows, width], and the factor of each row [rows, 1] float32."""
Fp8Gemm: TypeAlias = Callable[[QuantisedRows], torch.Tensor]
"""The GEMM of one linear layer with weights of 8-bit floats: such rows -> [rows, out_features] bfloat16."""


class BegunSum(ABC):
    """The rows [n, width] that a block adds to the residual stream, while ranks still exchange their parts of them."""

    @abstractmethod
    def add_rms_norm(self, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Add the sum of all ranks' parts to `residual` [n, width] in place and return its norm. Called once."""


class GemvKernels(Protocol):
    """GEMV kernels for a step of one row, fused with what stands around them. Weights are as for `Ops.make_linear`.

    A step of one row runs all its linear layers through them; a longer step that samples one row, those behind its last
    attention.
    """

    def norm_gemv(
        self,
        residual: torch.Tensor,  # [1, in]
        norm: torch.Tensor,  # [in]
        eps: float,
        weight: torch.Tensor,  # [out, in]
        bias: torch.Tensor | None,  # [out]
    ) -> torch.Tensor:
        """Return W rms_norm(residual) + b, [1, out]."""
        ...

    def norm_gated_gemv(
        self,
        residual: torch.Tensor,  # [1, in]
        norm: torch.Tensor,  # [in]
        eps: float,
        weight: torch.Tensor,  # [2 * out, in]: gate, then up
        bias: torch.Tensor | None,  # [2 * out]
    ) -> torch.Tensor:
        """Return silu(gate) * up of W rms_norm(residual) + b, [1, out]."""
        ...

    def gemv_add(
        self,
        x: torch.Tensor,  # [1, in]
        weight: torch.Tensor,  # [out, in]
        bias: torch.Tensor | None,  # [out]
        residual: torch.Tensor,  # [1, out], contiguous
    ) -> None:
        """Add W x + b to `residual`, in place."""
        ...

    def gemv(
        self,
        x: torch.Tensor,  # [1, in]
        weight: torch.Tensor,  # [out, in]
        bias: torch.Tensor | None,  # [out]
    ) -> torch.Tensor:
        """Return W x + b of a row that is normed already, [1, out]: on several ranks the norm is the all-reduce's."""
        ...

    def gated_gemv(
        self,
        x: torch.Tensor,  # [1, in]
        weight: torch.Tensor,  # [2 * out, in]: gate, then up
        bias: torch.Tensor | None,  # [2 * out]
    ) -> torch.Tensor:
        """Return silu(gate) * up of W x + b of such a row, [1, out]."""
        ...

    def partial_gemv(
        self,
        x: torch.Tensor,  # [1, in]
        weight: torch.Tensor,  # [out, in]
        bias: torch.Tensor | None,  # [out]
    ) -> torch.Tensor:
        """Return W x + b, [1, out]: this rank's part of a sum over ranks."""
        ...

    def head_gemv(
        self,
        x: torch.Tensor,  # [1, in]
        weight: torch.Tensor,  # [out, in]
    ) -> torch.Tensor:
        """Return W x, [1, out] float32."""
        ...


@dataclass(frozen=True, slots=True)
class Fp8Ops:
    """Implementations of linear layers that compute in fp8 (e4m3), and of what makes the rows that they read."""

    make_linear: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], Fp8Gemm]
    """weight [out, in] float8_e4m3fn, its scale [out] float32 and bias [out] or None, on the device -> the GEMM."""
    make_gemv: Callable[[torch.Tensor], GemvKernels]
    """The scale [out] float32 of one layer's weight -> kernels for one row of it. The row is not quantised."""
    quantise: Callable[[torch.Tensor], QuantisedRows]
    rms_norm: Callable[[torch.Tensor, torch.Tensor, float], QuantisedRows]
    """Does what `Ops.rms_norm` does."""
    add_rms_norm: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], QuantisedRows]
    """Does what `Ops.add_rms_norm` does, the change of the residual included."""
    silu_mul: Callable[[torch.Tensor], QuantisedRows]
    """Does what `Ops.silu_mul` does."""


@dataclass(frozen=True, slots=True)
class Ops:
    """Implementations for one device."""

    make_linear: Callable[[torch.Tensor, torch.Tensor | None], Gemm]
    """weight [out, in] and bias [out] or None, on the device -> the GEMM, with weights in the device's best layout."""
    make_head: Callable[[torch.Tensor], Gemm]
    """weight [vocab, in] -> the GEMM that gives logits; in float32 where the device sums in it anyway.

    bfloat16 keeps 8 bits of a logit: of 100 greedy tokens of a small model one or two are others, as good in these.
    """
    rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    """x [rows, width], weight [width], eps -> normed [rows, width]."""
    add_rms_norm: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
    """x, residual [rows, width], weight, eps: residual += x in place; returns the normed residual."""
    silu_mul: Callable[[torch.Tensor], torch.Tensor]
    """[rows, 2 * width] (gate, then up) -> silu(gate) * up [rows, width]."""
    gemv: GemvKernels | None
    """The device's GEMV kernels, if it has some. `make_linear` must take no copy of the weights then."""
    all_reduce_add_rms_norm: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor] | None = None
    """The same with the sum of all ranks' x. None: the ranks' own all-reduce stands before `add_rms_norm`."""
    begin_sum: Callable[[torch.Tensor, Gemm], BegunSum | None] | None = None
    """Rows [n, in] and the GEMM that makes this rank's part of a sum of them -> the sum, which ranks exchange while
    the GEMM still runs; None: these are too few rows for that. It calls the GEMM for some of the rows at a time."""
    fp8: Fp8Ops | None = None
    """For models with weights of 8-bit floats, where the device computes with them."""
