"""The blocks that dense decoder models share, made of `Ops` and `Weights`. No model's name appears here."""

from __future__ import annotations

import torch

from toka_engine.model.loader import Weights
from toka_engine.model.model_config import ModelConfig
from toka_engine.model.ops import Linear, Ops


def fused_linear(
    ops: Ops, weights: Weights, names: list[str], out_sizes: list[int], in_size: int, has_bias: bool
) -> Linear:
    """One product for several projections of the same input: their rows, one below the other."""
    pairs = list(zip(names, out_sizes, strict=True))
    weight = torch.cat([weights.take(f"{name}.weight", (size, in_size)) for name, size in pairs])
    bias = torch.cat([weights.take(f"{name}.bias", (size,)) for name, size in pairs]) if has_bias else None
    return ops.make_linear(weight, bias)


class GatedMlp:
    """down(silu(gate(x)) * up(x)), with gate and up as one product."""

    def __init__(self, config: ModelConfig, weights: Weights, ops: Ops, prefix: str) -> None:
        config.fields.require("hidden_act", "silu")
        hidden, inner, has_bias = config.hidden_size, config.intermediate_size, config.has_mlp_bias
        self._silu_mul = ops.silu_mul
        self._gate_up = fused_linear(
            ops, weights, [f"{prefix}.gate_proj", f"{prefix}.up_proj"], [inner, inner], hidden, has_bias
        )
        self._down = fused_linear(ops, weights, [f"{prefix}.down_proj"], [hidden], inner, has_bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._down(self._silu_mul(self._gate_up(x)))
