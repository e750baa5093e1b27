"""Linear layers: a batched GEMM and, where the device has one, a GEMV kernel for a step of one row.

A step of one row waits for its weights and little else, so the norm before a GEMV, the activation behind it and the add
to the residual stream are fused into it. A norm of one row is therefore left to the linear layer that reads it
(`DeferredNorm`), and the last linear layer of a block to the norm that adds its output (`DeferredAdd`). A model passes
both on as it passes on tensors, and looks into neither. On several ranks neither is deferred for a GEMV: between the
two stands the all-reduce, which is fused with the add and the norm instead.

In a model with weights of 8-bit floats, a norm and an activation of more rows are left to the linear layer that reads
them, too (`DeferredRows`): it knows whether it reads rows of 8-bit floats, which are then made in the same kernel.

Ranks on GPUs may exchange their parts of a block's output while its last GEMM still makes others (`ops.BegunSum`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch

from toka_engine.model.ops import BegunSum, Fp8Ops, Gemm, GemvKernels, Ops, QuantisedRows


@dataclass(frozen=True, slots=True)
class LinearParameters:
    """The parameters of one linear layer, on the device: this rank's part of them.

    Whatever computes W x + b gets this one value, so that more of it (an adapter) is a field here and not one more
    argument everywhere.
    """

    weight: torch.Tensor  # [out, in]
    bias: torch.Tensor | None  # [out]
    scale: torch.Tensor | None = None  # [out] float32: the weight's factors, if it is of 8-bit floats

    def scale_outputs(self, sizes: Sequence[int], factors: Sequence[float]) -> LinearParameters:
        """Return the layer with its first sizes[0] outputs multiplied by factors[0], the next by factors[1], and so."""
        if all(factor == 1.0 for factor in factors):
            return self
        of_each = torch.tensor(factors).repeat_interleave(torch.tensor(sizes))
        scaled = self.scale_weight(of_each)
        return scaled if self.bias is None else replace(scaled, bias=self.bias * of_each.to(self.bias))

    def scale_weight(self, factors: torch.Tensor) -> LinearParameters:
        """Return the layer with its weight's outputs, but not the bias, multiplied by `factors` [out] or one of all."""
        if self.scale is not None:
            return replace(self, scale=self.scale * factors.to(self.scale))
        return replace(self, weight=self.weight * factors.to(self.weight).reshape(-1, 1))


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


class DeferredRows(ABC):
    """Rows [n, width] that the linear layer which reads them computes, in the form in which it reads them."""

    @abstractmethod
    def compute(self) -> torch.Tensor:
        """Return the rows in the model's dtype."""

    @abstractmethod
    def quantise(self) -> QuantisedRows:
        """Return the rows as 8-bit floats."""


@dataclass(frozen=True, slots=True)
class NormedRows(DeferredRows):
    """The RMSNorm of rows of the residual stream, to which a block's output is added first, in place."""

    ops: Ops
    fp8: Fp8Ops
    pending: torch.Tensor | None  # [n, width]; None: nothing is to be added
    residual: torch.Tensor  # [n, width]
    weight: torch.Tensor  # [width]
    eps: float

    def compute(self) -> torch.Tensor:
        """See DeferredRows."""
        if self.pending is None:
            return self.ops.rms_norm(self.residual, self.weight, self.eps)
        return self.ops.add_rms_norm(self.pending, self.residual, self.weight, self.eps)

    def quantise(self) -> QuantisedRows:
        """See DeferredRows."""
        if self.pending is None:
            return self.fp8.rms_norm(self.residual, self.weight, self.eps)
        return self.fp8.add_rms_norm(self.pending, self.residual, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class GatedRows(DeferredRows):
    """The rows silu(gate) * up."""

    ops: Ops
    fp8: Fp8Ops
    gate_up: torch.Tensor  # [n, 2 * width]

    def compute(self) -> torch.Tensor:
        """See DeferredRows."""
        return self.ops.silu_mul(self.gate_up)

    def quantise(self) -> QuantisedRows:
        """See DeferredRows."""
        return self.fp8.silu_mul(self.gate_up)


Activation: TypeAlias = torch.Tensor | DeferredNorm | DeferredAdd | DeferredRows | BegunSum
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
        weight, bias, scale = parameters.weight, parameters.bias, parameters.scale
        kernels = ops.gemv
        if scale is None:
            self.gemm = ops.make_linear(weight, bias)
            self._multiply = _multiply_computed(self.gemm)
        else:
            assert ops.fp8 is not None, "weights are kept as 8-bit floats only where the device computes with them"
            multiply, quantise = ops.fp8.make_linear(weight, scale, bias), ops.fp8.quantise
            self.gemm = lambda x: multiply(quantise(x))
            self._multiply = lambda rows: multiply(rows.quantise())
            kernels = None if kernels is None else ops.fp8.make_gemv(scale)
        self.gemv = None if kernels is None else Gemv(kernels, parameters)

    def __call__(self, x: Activation) -> torch.Tensor:
        """[n, in] -> [n, out]."""
        match x:
            case torch.Tensor():
                # In this order: where there are no kernels, a trace must not ask for the rows.
                if self.gemv is not None and x.shape[0] == 1:
                    return self.gemv.apply(x)
                return self.gemm(x)
            case DeferredNorm():
                return self.find_gemv().apply_to_norm(x)
            case DeferredRows():
                return self._multiply(x)
            case DeferredAdd() | BegunSum():
                raise AssertionError("a linear layer reads a norm or another layer, not a block's output")

    def find_gemv(self) -> Gemv:
        """The GEMV of a deferred norm."""
        if self.gemv is None:
            raise AssertionError("a norm is deferred only where the device has GEMV kernels")
        return self.gemv


def _multiply_computed(gemm: Gemm) -> Callable[[DeferredRows], torch.Tensor]:
    return lambda rows: gemm(rows.compute())


class GatedLinear:
    """silu(gate(x)) * up(x), where one GEMM computes gate and up: gate's outputs, then up's."""

    def __init__(self, ops: Ops, parameters: LinearParameters) -> None:
        self._linear = Linear(ops, parameters)
        self._silu_mul: Callable[[torch.Tensor], Activation] = ops.silu_mul
        if ops.fp8 is not None:
            self._silu_mul = partial(GatedRows, ops, ops.fp8)

    def __call__(self, x: Activation) -> Activation:
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
        self._begin_sum = ops.begin_sum if is_partial and parameters.scale is None else None

    def __call__(self, x: Activation, wanted: torch.Tensor | None = None) -> Activation:
        """x [n, in] -> what is to be added to the stream [n, out]; of the rows `wanted` alone, if given."""
        if not isinstance(x, torch.Tensor):
            assert wanted is None, "rows are chosen behind the last attention, whose output is a tensor"
            return self._linear(x)
        if wanted is not None:
            x = x.index_select(0, wanted)
        elif self._begin_sum is not None and (begun := self._begin_sum(x, self._linear.gemm)) is not None:
            return begun
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
