"""The blocks that dense decoder models share, made of `Ops` and `Weights`. No model's name appears here.

A layer adds to a residual stream. What an addition has computed and not yet added is `pending`: the next norm adds it,
in the same pass over the rows. For a step of one row a device may have kernels that add at once (`Ops.single_row`);
then nothing is pending. The blocks look after that: no model knows how many rows there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from toka_engine.model.loader import Weights
from toka_engine.model.model_config import ModelConfig
from toka_engine.model.ops import Ops, SingleRow


@dataclass(frozen=True, slots=True)
class Projections:
    """Projections of one input, as one product."""

    weight: torch.Tensor  # [all outputs, in]
    bias: torch.Tensor | None  # [all outputs]


def fuse(weights: Weights, names: list[str], out_sizes: list[int], in_size: int, has_bias: bool) -> Projections:
    """Take the projections `names` of the same input: their rows, one below the other."""
    pairs = list(zip(names, out_sizes, strict=True))
    weight = torch.cat([weights.take(f"{name}.weight", (size, in_size)) for name, size in pairs])
    bias = torch.cat([weights.take(f"{name}.bias", (size,)) for name, size in pairs]) if has_bias else None
    return Projections(weight, bias)


class ResidualNorm:
    """The norm of the residual stream."""

    def __init__(self, ops: Ops, weight: torch.Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps
        self._rms_norm, self._add_rms_norm = ops.rms_norm, ops.add_rms_norm

    def __call__(self, pending: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
        """Add `pending` to `residual` [rows, width] in place, if there is any, and return the norm [rows, width]."""
        if pending is None:
            return self._rms_norm(residual, self.weight, self.eps)
        return self._add_rms_norm(pending, residual, self.weight, self.eps)


class _Product:
    """What one product is computed with. The weights are held once: where there are kernels for one row, a device's
    `make_linear` takes them as they are; where it packs them, they are not kept beside.
    """

    def __init__(self, ops: Ops, projections: Projections) -> None:
        self.of_many_rows = ops.make_linear(projections.weight, projections.bias)
        self._single_row = None if ops.single_row is None else (ops.single_row, projections)

    def find_single_row(
        self, rows: torch.Tensor, pending: torch.Tensor | None = None
    ) -> tuple[SingleRow, Projections] | None:
        """What a step of one row is computed with, if this is one, the device has kernels for it, and nothing is
        pending: those kernels leave nothing, and add nothing that others have left.
        """
        # In this order: where there are no kernels, a trace must not ask for the rows.
        if self._single_row is None or rows.shape[0] != 1 or pending is not None:
            return None
        return self._single_row


class NormedLinear:
    """A product of the residual stream's norm."""

    def __init__(self, ops: Ops, norm: torch.Tensor, eps: float, projections: Projections) -> None:
        self._norm = ResidualNorm(ops, norm, eps)
        self._product = _Product(ops, projections)

    def __call__(self, pending: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
        """Add `pending` to `residual` [rows, in] in place, if there is any, and return [rows, out]."""
        found = self._product.find_single_row(residual, pending)
        if found is None:
            return self._product.of_many_rows(self._norm(pending, residual))
        kernels, projections = found
        return kernels.product(residual, self._norm.weight, self._norm.eps, projections.weight, projections.bias)


class ResidualLinear:
    """A product that is to be added to the residual stream."""

    def __init__(self, ops: Ops, projections: Projections) -> None:
        self._product = _Product(ops, projections)

    def __call__(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor | None:
        """x [rows, in], residual [rows, out] -> the product [rows, out], or None if it has been added in place."""
        found = self._product.find_single_row(residual)
        if found is None:
            return self._product.of_many_rows(x)
        kernels, projections = found
        kernels.add_product(x, projections.weight, projections.bias, residual)
        return None


class Head:
    """The product that makes logits of normed rows, which are no residual stream."""

    def __init__(self, ops: Ops, weight: torch.Tensor) -> None:
        self._of_many_rows = ops.make_head(weight)
        self._single_row = None if ops.single_row is None else (ops.single_row, weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, in] -> [rows, vocab]."""
        if self._single_row is None or x.shape[0] != 1:
            return self._of_many_rows(x)
        kernels, weight = self._single_row
        return kernels.head_product(x, weight)


class GatedMlp:
    """down(silu(gate(x)) * up(x)) of the residual stream's norm x, with gate and up as one product."""

    def __init__(self, config: ModelConfig, weights: Weights, ops: Ops, prefix: str, norm: torch.Tensor) -> None:
        config.fields.require("hidden_act", "silu")
        hidden, inner, has_bias = config.hidden_size, config.intermediate_size, config.has_mlp_bias
        names = [f"{prefix}.gate_proj", f"{prefix}.up_proj"]
        self._norm = ResidualNorm(ops, norm, config.rms_norm_eps)
        self._gate_up = _Product(ops, fuse(weights, names, [inner, inner], hidden, has_bias))
        self._silu_mul = ops.silu_mul
        self._down = ResidualLinear(ops, fuse(weights, [f"{prefix}.down_proj"], [hidden], inner, has_bias))

    def __call__(self, pending: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor | None:
        """Add `pending` to `residual` [rows, hidden_size] in place, if there is any; returns what is pending then."""
        found = self._gate_up.find_single_row(residual, pending)
        if found is None:
            x = self._silu_mul(self._gate_up.of_many_rows(self._norm(pending, residual)))
        else:
            kernels, gate_up = found
            x = kernels.gated_product(residual, self._norm.weight, self._norm.eps, gate_up.weight, gate_up.bias)
        return self._down(x, residual)
