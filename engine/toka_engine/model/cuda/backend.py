"""The NVIDIA GPU backend: its operators, and the runner that is made of its parts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from toka_engine.config import EngineConfig
from toka_engine.model.attention_backend import AttentionShape
from toka_engine.model.causal import CausalModel
from toka_engine.model.cuda.attention import CudaAttention
from toka_engine.model.cuda.gpu_stages import GpuStages
from toka_engine.model.cuda.memory_fit import provisional_sizes
from toka_engine.model.cuda.products import Products
from toka_engine.model.cuda.runner import CudaRunner
from toka_engine.model.cuda.stage_runner import LastStageRunner, StageRunner
from toka_engine.model.cuda.tensor_parallel import TensorParallel
from toka_engine.model.kernels import FP8_CAPABILITY
from toka_engine.model.kernels.activation import silu_mul
from toka_engine.model.kernels.fp8_gemv import Fp8Gemv
from toka_engine.model.kernels.gemv import TritonGemv
from toka_engine.model.kernels.norm import add_rms_norm, rms_norm
from toka_engine.model.kernels.quantised_rows import (
    quantise_rows,
    quantised_add_rms_norm,
    quantised_rms_norm,
    quantised_silu_mul,
)
from toka_engine.model.model_config import ModelConfig
from toka_engine.model.ops import Fp8Gemm, Fp8Ops, Gemm, Ops, QuantisedRows
from toka_engine.model.sizing import Sizes, choose_sizes, read_available_bytes


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Gemm:
    def linear(x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight, bias)

    return linear


def make_head(weight: torch.Tensor) -> Gemm:
    transposed = weight.t()

    def head(x: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, transposed, out_dtype=torch.float32)

    return head


def make_fp8_linear(weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> Fp8Gemm:
    """Make the GEMM of rows with a scale each and outputs with a scale each."""
    transposed, scales = weight.t(), scale.unsqueeze(0)

    def linear(rows: QuantisedRows) -> torch.Tensor:
        values, factors = rows
        if not values.shape[0]:
            return values.new_empty((0, weight.shape[0]), dtype=torch.bfloat16)
        return torch._scaled_mm(
            values, transposed, factors, scales, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return linear


def make_fp8_ops(capability: int) -> Fp8Ops:
    """Make the operators of linear layers in fp8 for a GPU that has them."""
    return Fp8Ops(
        make_linear=make_fp8_linear,
        make_gemv=partial(Fp8Gemv.for_capability, capability),
        quantise=quantise_rows,
        rms_norm=quantised_rms_norm,
        add_rms_norm=quantised_add_rms_norm,
        silu_mul=quantised_silu_mul,
    )


def make_ops(capability: int, parallel: TensorParallel | None = None) -> Ops:
    """Make the operators for a GPU of this compute capability, as 90; of a rank, if there are several."""
    return Ops(
        make_linear=make_linear,
        make_head=make_head,
        rms_norm=rms_norm,
        add_rms_norm=add_rms_norm,
        silu_mul=silu_mul,
        gemv=TritonGemv.for_capability(capability),
        all_reduce_add_rms_norm=None if parallel is None else parallel.all_reduce_add_rms_norm,
        begin_sum=None if parallel is None else parallel.begin_sum,
        fp8=make_fp8_ops(capability) if capability >= FP8_CAPABILITY else None,
    )


class CudaBackend:
    """A backend.Backend. Unless the user sizes the KV cache, it is fitted into what the largest steps leave."""

    has_packed_linears = False

    def __init__(
        self, capability: int, parallel: TensorParallel | None = None, stages: GpuStages | None = None
    ) -> None:
        """`capability`: the GPU's compute capability, as 90. `parallel`: what this rank shares with others, if any;
        `stages`: with other pipeline stages.
        """
        self._products = Products()
        self.ops = self._products.watch(make_ops(capability, parallel))
        self._parallel, self._stages = parallel, stages

    def choose_sizes(self, config: EngineConfig, model: ModelConfig, shape: AttentionShape) -> Sizes:
        """See backend.Backend. The number of pages is provisional where `CudaRunner.prepare` fits the cache."""
        available = read_available_bytes(shape.device)
        if self._parallel is not None:
            available = self._parallel.agree_min(available)
        sizes = choose_sizes(config, model, shape.device, shape.kv_bytes_per_token, available)
        if self._stages is not None:  # they have layers of their own number
            num_pages = self._stages.links.agree_min(sizes.num_pages)
            sizes = replace(sizes, num_pages=num_pages, max_pages_per_seq=min(sizes.max_pages_per_seq, num_pages))
        return provisional_sizes(sizes) if config.kv_cache_num_tokens is None else sizes

    def make_runner(self, model: CausalModel, shape: AttentionShape, sizes: Sizes, config: EngineConfig) -> CudaRunner:
        """See backend.Backend. The GEMM kernels of the model that was made of `ops` are loaded first."""
        self._products.load(sizes.max_tokens_per_forward)
        attention = CudaAttention(shape)
        attention.allocate(sizes.num_pages, sizes.page_size, sizes.max_seqs, sizes.max_pages_per_seq)
        if self._stages is None:
            return CudaRunner(model, attention, sizes.max_seqs, config, self._parallel)
        kind = LastStageRunner if self._stages.ports.is_last else StageRunner
        return kind(model, attention, sizes.max_seqs, config, self._stages, self._parallel)
