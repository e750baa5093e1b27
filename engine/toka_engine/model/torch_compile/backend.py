"""torch_compile=T: a backend around a device's own, whose models torch.compile compiles. Models know nothing of it."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from toka_engine.config import EngineConfig
from toka_engine.model.attention_backend import AttentionShape
from toka_engine.model.backend import Backend, Runner
from toka_engine.model.causal import CausalModel
from toka_engine.model.model_config import ModelConfig
from toka_engine.model.ops import Gemm
from toka_engine.model.sizing import Sizes
from toka_engine.model.torch_compile.compiled_model import CompiledModel, Outside, check_cpu
from toka_engine.model.torch_norms import add_rms_norm, rms_norm

_LARGEST_FORWARD = 1 << 14
"""Rows that a step may have where the settings do not say: twice the default on a GPU. A larger bound would cost models
their start: inductor counts in 32 bits and refuses a number of rows with which any tensor could have more elements."""


class CompiledBackend:
    """A backend.Backend. Its norms and activation are plain torch, for inductor to fuse.

    It has no kernels for a single row: a trace would have to ask whether it is one.
    """

    def __init__(self, device_backend: Backend, device: torch.device, mode: str) -> None:
        """`mode`: one of torch.compile's. Raises ConfigError where this machine cannot compile."""
        if device.type == "cpu":
            check_cpu(mode)
        self._device_backend, self._device, self._mode = device_backend, device, mode
        self._outside = Outside()
        self.has_packed_linears = device_backend.has_packed_linears
        self.ops = replace(
            device_backend.ops,
            make_linear=self._make_linear,
            rms_norm=rms_norm,
            add_rms_norm=add_rms_norm,
            silu_mul=_silu_mul,
            gemv=None,
            fp8=None,
        )

    def choose_sizes(self, config: EngineConfig, model: ModelConfig, shape: AttentionShape) -> Sizes:
        """See backend.Backend."""
        return self._device_backend.choose_sizes(config, model, shape)

    def make_runner(self, model: CausalModel, shape: AttentionShape, sizes: Sizes, config: EngineConfig) -> Runner:
        """See backend.Backend. Compiles the model first."""
        compiled = CompiledModel(model, self._outside)
        max_rows = max(sizes.max_seqs, config.max_tokens_per_forward or _LARGEST_FORWARD)
        compiled.compile(self._device, self._mode, max_rows)
        return self._device_backend.make_runner(compiled, shape, sizes, config)

    def _make_linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Gemm:
        linear = self._device_backend.ops.make_linear(weight, bias)
        return self._outside.add(linear, weight.shape[0]) if self.has_packed_linears else linear


def _silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate) * up
