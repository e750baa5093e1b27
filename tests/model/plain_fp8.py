"""The operators of linear layers in fp8 in plain torch, for a CPU: definitions, not fast ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from toka_engine.model.ops import Fp8Gemm, Fp8Ops, GemvKernels, QuantisedRows
from toka_engine.model.quantization import quantise_weight

from tests.model.test_single_row import PlainGemv


def quantise(x: torch.Tensor) -> QuantisedRows:
    found = quantise_weight(x)  # a row is quantised as an output's weights are
    return found.values, found.scale[:, None]


class ScaledGemv(PlainGemv):
    """An ops.GemvKernels for weights with the scales of one layer."""

    def __init__(self, scale: torch.Tensor, calls: list[str]) -> None:
        super().__init__()
        self._scale, self._calls = scale, calls

    def _whole(self, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        assert weight.dtype == torch.float8_e4m3fn
        self._calls.append("gemv")
        return (weight.float() * self._scale[:, None]).to(x.dtype)

    def norm_gemv(self, residual, norm, eps, weight, bias):  # type: ignore[no-untyped-def]
        return super().norm_gemv(residual, norm, eps, self._whole(weight, residual), bias)

    def norm_gated_gemv(self, residual, norm, eps, weight, bias):  # type: ignore[no-untyped-def]
        return super().norm_gated_gemv(residual, norm, eps, self._whole(weight, residual), bias)

    def gemv_add(self, x, weight, bias, residual):  # type: ignore[no-untyped-def]
        super().gemv_add(x, self._whole(weight, x), bias, residual)

    def partial_gemv(self, x, weight, bias):  # type: ignore[no-untyped-def]
        return super().partial_gemv(x, self._whole(weight, x), bias)


class PlainFp8:
    """Makes the operators, and notes what layers are made with and which operators run."""

    def __init__(self) -> None:
        self.weights: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.calls: list[str] = []

    def make_ops(self) -> Fp8Ops:
        return Fp8Ops(
            make_linear=self._make_linear,
            make_gemv=self._make_gemv,
            quantise=self._quantise,
            rms_norm=self._rms_norm,
            add_rms_norm=self._add_rms_norm,
            silu_mul=self._silu_mul,
        )

    def _make_linear(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> Fp8Gemm:
        assert weight.dtype == torch.float8_e4m3fn
        assert scale.dtype == torch.float32
        assert scale.shape == weight.shape[:1]
        self.weights.append((weight, scale))

        def linear(rows: QuantisedRows) -> torch.Tensor:
            self.calls.append("gemm")
            products = F.linear(rows[0].float(), weight.float()) * rows[1] * scale
            return (products if bias is None else products + bias.float()).bfloat16()

        return linear

    def _make_gemv(self, scale: torch.Tensor) -> GemvKernels:
        return ScaledGemv(scale, self.calls)

    def _quantise(self, x: torch.Tensor) -> QuantisedRows:
        self.calls.append("quantise")
        return quantise(x)

    def _rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> QuantisedRows:
        self.calls.append("norm")
        return quantise(F.rms_norm(x.float(), weight.shape, weight.float(), eps))

    def _add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> QuantisedRows:
        self.calls.append("add_norm")
        return quantise(F.rms_norm(residual.add_(x).float(), weight.shape, weight.float(), eps))

    def _silu_mul(self, gate_up: torch.Tensor) -> QuantisedRows:
        self.calls.append("silu_mul")
        gate, up = gate_up.float().chunk(2, dim=1)
        return quantise(F.silu(gate) * up)
