"""Linear layers: a batched GEMM and, where the device has one, a GEMV kernel for a step of one row.

A step of one row waits for its weights and little else, so the norm before a GEMV, the activation behind it and the add
to the residual stream are fused into it. A norm of one row is therefore left to the linear layer that reads it
(`DeferredNorm`), and the last linear layer of a block to the norm that adds its output (`DeferredAdd`). A model passes
both on as it passes on tensors, and looks into neither. On several ranks neither is deferred for a GEMV: between the
two stands the all-reduce, which is fused with the add and the norm instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from toka_engine.model.ops import GemvKernels, Ops


@dataclass(frozen=True, slots=True)
class LinearParameters:
    """The parameters of one linear layer, on the device: this rank's part of them.

    Whatever computes W x + b gets this one value, so that more of it (the scales of a quantised weight, an adapter) is
    a field here and not one more argument everywhere.
    """

    weight: torch.Tensor  # [out, in]
    bias: torch.Tensor | None  # [out]


@dataclass(frozen=True, slots=True)
class DeferredNorm:
    """The RMSNorm of one row of the residual stream, to be computed by the GEMV that reads it."""

    residual: torch.Tensor  # [1, width]
    weight: torch.Tensor  # [width]
    eps: float


@dataclass(frozen=True, slots=True)
class DeferredAdd:
    """A block's output whose add to the residual stream takes more than its value.

    With `gemv`, `x` is the input of the block's last linear layer, whose GEMV adds to the stream. With `wanted`, only
    these rows of the stream go on, and `x` has only them.
    """

    x: torch.Tensor  # [n, width], or [1, in] with `gemv`
    gemv: Gemv | None
    wanted: torch.Tensor | None  # [n], indices into the rows of the stream


Activation: TypeAlias = torch.Tensor | DeferredNorm | DeferredAdd
"""Rows [n, width] that pass between layers, or rows that the next layer computes along with its own work."""


@dataclass(frozen=True, slots=True)
class Gemv:
    """A linear layer for one row. It holds the weights that the GEMM has, not a copy."""

    kernels: GemvKernels
    parameters: LinearParameters

    def apply_to_norm(self, norm: DeferredNorm) -> torch.Tensor:
        """The norm [1, in] -> [1, out]."""
        weight, bias = self.parameters.weight, self.parameters.bias
        return self.kernels.norm_gemv(norm.residual, norm.weight, norm.eps, weight, bias)

    def apply_gated_to_norm(self, norm: DeferredNorm) -> torch.Tensor:
        """The norm [1, in] -> silu(gate) * up [1, out / 2]."""
        weight, bias = self.parameters.weight, self.parameters.bias
        return self.kernels.norm_gated_gemv(norm.residual, norm.weight, norm.eps, weight, bias)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """A row [1, in] that is normed already -> [1, out]."""
        return self.kernels.gemv(x, self.parameters.weight, self.parameters.bias)

    def apply_gated(self, x: torch.Tensor) -> torch.Tensor:
        """A row [1, in] that is normed already -> silu(gate) * up [1, out / 2]."""
        return self.kernels.gated_gemv(x, self.parameters.weight, self.parameters.bias)

    def apply_partial(self, x: torch.Tensor) -> torch.Tensor:
        """A row [1, in] -> this rank's part [1, out] of a sum over ranks."""
        return self.kernels.partial_gemv(x, self.parameters.weight, self.parameters.bias)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> None:
        """Add the output for x [1, in] to `residual` [1, out] in place."""
        self.kernels.gemv_add(x, self.parameters.weight, self.parameters.bias, residual)


class Linear:
    """y = W x + b. The weights are held once: `Ops.make_linear` packs them, or shares them with the GEMV."""

    def __init__(self, ops: Ops, parameters: LinearParameters) -> None:
        self.gemm = ops.make_linear(parameters.weight, parameters.bias)
        self.gemv = None if ops.gemv is None else Gemv(ops.gemv, parameters)

    def __call__(self, x: Activation) -> torch.Tensor:
        """[n, in] -> [n, out]."""
        match x:
            case DeferredNorm():
                return self.find_gemv().apply_to_norm(x)
            case DeferredAdd():
                raise AssertionError("a linear layer reads a norm or another layer, not a block's output")
            case _:
                # In this order: where there are no kernels, a trace must not ask for the rows.
                if self.gemv is not None and x.shape[0] == 1:
                    return self.gemv.apply(x)
                return self.gemm(x)

    def find_gemv(self) -> Gemv:
        """The GEMV of a deferred norm."""
        if self.gemv is None:
            raise AssertionError("a norm is deferred only where the device has GEMV kernels")
        return self.gemv


class GatedLinear:
    """silu(gate(x)) * up(x), where one GEMM computes gate and up: gate's outputs, then up's."""

    def __init__(self, ops: Ops, parameters: LinearParameters) -> None:
        self._linear, self._silu_mul = Linear(ops, parameters), ops.silu_mul

    def __call__(self, x: Activation) -> torch.Tensor:
        """[n, in] -> [n, out / 2]."""
        if isinstance(x, DeferredNorm):
            return self._linear.find_gemv().apply_gated_to_norm(x)
        gemv = self._linear.gemv
        if gemv is not None and isinstance(x, torch.Tensor) and x.shape[0] == 1:
            return gemv.apply_gated(x)
        return self._silu_mul(self._linear(x))


class ResidualLinear:
    """The last linear layer of a block: its output is added to the residual stream by the next norm."""

    def __init__(self, ops: Ops, parameters: LinearParameters, is_partial: bool = False) -> None:
        """`is_partial`: the output is one rank's part of a sum, which the next norm computes."""
        self._linear, self._is_partial = Linear(ops, parameters), is_partial

    def __call__(self, x: torch.Tensor, wanted: torch.Tensor | None = None) -> Activation:
        """x [n, in] -> what is to be added to the stream [n, out]; of the rows `wanted` alone, if given."""
        if wanted is not None:
            x = x.index_select(0, wanted)
        gemv = self._linear.gemv
        # In this order: where there are no kernels, a trace must not ask for the rows.
        if gemv is not None and x.shape[0] == 1:
            if not self._is_partial:
                return DeferredAdd(x, gemv, wanted)
            output = gemv.apply_partial(x)
        else:
            output = self._linear(x)
        return output if wanted is None else DeferredAdd(output, None, wanted)


class LmHead:
    """The linear layer that makes logits of normed rows."""

    def __init__(self, ops: Ops, weight: torch.Tensor) -> None:
        self._gemm = ops.make_head(weight)
        self._gemv = None if ops.gemv is None else (ops.gemv, weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[n, in] -> [n, vocab]."""
        if self._gemv is None or x.shape[0] != 1:
            return self._gemm(x)
        kernels, weight = self._gemv
        return kernels.head_gemv(x, weight)
