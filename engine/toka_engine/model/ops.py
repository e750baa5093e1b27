"""The table of operators that models and layers are made of, beside the attention interface. Each backend has one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

Linear: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""[rows, in_features] -> [rows, out_features]."""


class SingleRow(Protocol):
    """Products of one row, each one kernel with what lies around it. Weights are as for `Ops.make_linear`.

    Of a step of one row these are all products; where a longer step samples one row, those behind the last attention.
    """

    def product(
        self,
        residual: torch.Tensor,  # [1, in]
        norm: torch.Tensor,  # [in]
        eps: float,
        weight: torch.Tensor,  # [out, in]
        bias: torch.Tensor | None,  # [out]
    ) -> torch.Tensor:
        """Of rms_norm(residual): [1, out]."""
        ...

    def gated_product(
        self,
        residual: torch.Tensor,  # [1, in]
        norm: torch.Tensor,  # [in]
        eps: float,
        weight: torch.Tensor,  # [2 * out, in]: gate, then up
        bias: torch.Tensor | None,  # [2 * out]
    ) -> torch.Tensor:
        """Of rms_norm(residual), then silu(gate) * up: [1, out]."""
        ...

    def add_product(
        self,
        x: torch.Tensor,  # [1, in]
        weight: torch.Tensor,  # [out, in]
        bias: torch.Tensor | None,  # [out]
        residual: torch.Tensor,  # [1, out], contiguous
    ) -> None:
        """Add the product of x to `residual`, in place."""
        ...

    def head_product(
        self,
        x: torch.Tensor,  # [1, in]
        weight: torch.Tensor,  # [out, in]
    ) -> torch.Tensor:
        """Of x, with nothing around it: [1, out] float32."""
        ...


@dataclass(frozen=True, slots=True)
class Ops:
    """Implementations for one device."""

    make_linear: Callable[[torch.Tensor, torch.Tensor | None], Linear]
    """weight [out, in] and bias [out] or None, on the device -> the product in the device's best layout."""
    make_head: Callable[[torch.Tensor], Linear]
    """weight [vocab, in] -> the product that gives logits; in float32 where the device sums in it anyway.

    bfloat16 keeps 8 bits of a logit: of 100 greedy tokens of a small model one or two are others, as good in these.
    """
    rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    """x [rows, width], weight [width], eps -> normed [rows, width]."""
    add_rms_norm: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
    """x, residual [rows, width], weight, eps: residual += x in place; returns the normed residual."""
    silu_mul: Callable[[torch.Tensor], torch.Tensor]
    """[rows, 2 * width] (gate, then up) -> silu(gate) * up [rows, width]."""
    single_row: SingleRow | None
    """Kernels for a step of one row, where there are some. `make_linear` must take no copy of the weights then."""
