"""The table of implementations for NVIDIA GPUs (see ops)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from toka_engine.config import EngineConfig
from toka_engine.model.attention_backend import AttentionBackend, AttentionShape
from toka_engine.model.causal import CausalModel
from toka_engine.model.cuda.attention import FlashInferAttention
from toka_engine.model.cuda.runner import CudaRunner
from toka_engine.model.kernels.activation import silu_mul
from toka_engine.model.kernels.gemv import SingleRowKernels
from toka_engine.model.kernels.norm import add_rms_norm, rms_norm
from toka_engine.model.ops import Linear, Ops


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    def linear(x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight, bias)

    return linear


def make_head(weight: torch.Tensor) -> Linear:
    transposed = weight.t()

    def head(x: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, transposed, out_dtype=torch.float32)

    return head


def _make_attention(shape: AttentionShape, config: EngineConfig) -> AttentionBackend:
    return FlashInferAttention(shape)


def _make_runner(model: CausalModel, attention: AttentionBackend, max_seqs: int, config: EngineConfig) -> CudaRunner:
    if not isinstance(attention, FlashInferAttention):
        raise AssertionError("a CUDA runner needs the CUDA attention")
    return CudaRunner(model, attention, max_seqs, config)


def make_ops(capability: int) -> Ops:
    """The table for a GPU of this compute capability, as 90."""
    return Ops(
        make_linear=make_linear,
        make_head=make_head,
        rms_norm=rms_norm,
        add_rms_norm=add_rms_norm,
        silu_mul=silu_mul,
        single_row=SingleRowKernels.for_capability(capability),
        make_attention=_make_attention,
        make_runner=_make_runner,
        fits_cache=True,
        has_packed_products=False,
        max_steps_in_flight=2,
    )
