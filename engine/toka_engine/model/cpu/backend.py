"""The CPU backend: its operators, and the runner that is made of its parts.

Linear layers are packed by oneDNN once, at load: for one row that is 2-3 times as fast as an unpacked GEMM. Its
bfloat16 GEMM gives each row the same bits whatever the number of rows (a test holds it to that), which makes seeded
requests repeatable whatever else runs. The one exception is a single row of more than 1,024 values, whose sum it splits
in two: such a row is computed as two rows.

oneDNN makes a primitive of some 0.6 MB for every number of rows that a layer's shape meets, and keeps 1,024; so do the
caches of torch around it. A batch has a new number of rows in many a step: they would grow by 300 MB and more, which no
pod has reserved. `make_ops` keeps fewer; making one again takes 0.3 ms, and steps of equal size still find theirs.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from toka_engine.config import EngineConfig
from toka_engine.control_messages import RankInfo
from toka_engine.model.attention_backend import AttentionShape
from toka_engine.model.causal import CausalModel
from toka_engine.model.cpu.agreement import check_step
from toka_engine.model.cpu.attention import CpuAttention
from toka_engine.model.cpu.runner import CpuRunner
from toka_engine.model.cpu.sampler import CpuSampler
from toka_engine.model.cpu.stage_exchange import StageExchange
from toka_engine.model.cpu.stage_runner import StageRunner
from toka_engine.model.cpu.vocabulary import ShardedVocabulary, WholeVocabulary
from toka_engine.model.model_config import ModelConfig
from toka_engine.model.ops import Gemm, Ops
from toka_engine.model.ranks import Ranks
from toka_engine.model.sizing import Sizes, choose_sizes, read_available_bytes
from toka_engine.model.slot_state import HostSlots
from toka_engine.model.torch_norms import add_rms_norm, rms_norm
from toka_engine.noise import settled_seed
from toka_engine.topology import Role, find_stage_ranks, name_process

_PACKED_FOR_ROWS = 32
_MAX_EXACT_SINGLE_ROW = 1024
_ROUNDED_ROWS = 16
"""Rows of a float32 GEMM that stands in for a bfloat16 one."""
_PRIMITIVE_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Variables that oneDNN and torch's ideep read at their first GEMM."""
_NUM_PRIMITIVES = "64"


def can_pack_bfloat16() -> bool:
    """Whether oneDNN has linear layers in bfloat16 for this CPU at all, fast or not: avx512bw or avx_ne_convert."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Gemm:
    """Pack `weight` [out, in]; see ops.Ops.

    On a CPU without bfloat16 a layer of that type computes in float32 and rounds its output: right, with twice the
    memory for weights, and slower than dtype=float32.
    """
    if weight.dtype == torch.bfloat16 and not can_pack_bfloat16():
        return _make_rounding_linear(weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)
    product = torch.ops.mkldnn._linear_pointwise.default

    def linear(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = product(x, packed, bias, "none", [], "")
        return result

    def linear_of_two_or_more(x: torch.Tensor) -> torch.Tensor:
        return linear(x.expand(2, -1).contiguous())[:1] if x.shape[0] == 1 else linear(x)

    return linear if weight.shape[1] <= _MAX_EXACT_SINGLE_ROW else linear_of_two_or_more


def _make_rounding_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Gemm:
    """Make a bfloat16 layer of float32 GEMMs, each of as many rows, so that a row has the same bits in any batch."""
    wide = make_linear(weight.float(), None if bias is None else bias.float())

    def linear(x: torch.Tensor) -> torch.Tensor:
        padded = F.pad(x.float(), (0, 0, 0, -x.shape[0] % _ROUNDED_ROWS))
        parts = [wide(part) for part in padded.split(_ROUNDED_ROWS)]
        return torch.cat(parts)[: x.shape[0]].to(torch.bfloat16)

    return linear


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    width = gate_up.shape[1] // 2
    return F.silu(gate_up.narrow(1, 0, width)).mul_(gate_up.narrow(1, width, width))


def make_ops() -> Ops:
    """Make the operators, before the process's first GEMM (see above)."""
    for name in _PRIMITIVE_CACHES:
        os.environ.setdefault(name, _NUM_PRIMITIVES)
    return Ops(
        make_linear=make_linear,
        make_head=lambda weight: make_linear(weight, None),
        rms_norm=rms_norm,
        add_rms_norm=add_rms_norm,
        silu_mul=silu_mul,
        gemv=None,
    )


class CpuBackend:
    """A backend.Backend."""

    has_packed_linears = True

    def __init__(self, ranks: Ranks, exchange: StageExchange | None = None) -> None:
        """`exchange`: with the other pipeline stages; None: there is one."""
        self.ops = make_ops()
        self._ranks, self._exchange = ranks, exchange
        self._links = None if exchange is None else exchange.links
        self._rank = RankInfo(tp_rank=ranks.rank, tp_size=ranks.size) if exchange is None else exchange.links.rank

    def choose_sizes(self, config: EngineConfig, model: ModelConfig, shape: AttentionShape) -> Sizes:
        """See backend.Backend."""
        # Ranks share the machine's memory, and what they choose must be equal.
        if self._links is not None:
            self._links.agree_min(0)  # all have their weights before anybody looks at what is left
        available = self._ranks.agree_min(read_available_bytes(shape.device)) // self._ranks.size
        if self._links is None:
            return choose_sizes(config, model, shape.device, shape.kv_bytes_per_token, available)
        available = self._links.agree_min(available) // self._links.rank.pp_size
        sizes = choose_sizes(config, model, shape.device, shape.kv_bytes_per_token, available)
        num_pages = self._links.agree_min(sizes.num_pages)
        return replace(sizes, num_pages=num_pages, max_pages_per_seq=min(sizes.max_pages_per_seq, num_pages))

    def make_runner(
        self, model: CausalModel, shape: AttentionShape, sizes: Sizes, config: EngineConfig
    ) -> CpuRunner | StageRunner:
        """See backend.Backend."""
        attention = CpuAttention(shape)
        attention.allocate(sizes.num_pages, sizes.page_size, sizes.max_seqs, sizes.max_pages_per_seq)
        state, is_whole = HostSlots(sizes.max_seqs), self._ranks.size == 1
        names = [name_process(Role.MODEL, each) for each in find_stage_ranks(self._rank)]
        check = None if is_whole else partial(check_step, self._ranks, names)
        if self._exchange is not None and not self._exchange.is_last:
            return StageRunner(model, attention, state, self._exchange, check)
        vocabulary = WholeVocabulary() if is_whole else ShardedVocabulary(self._ranks, model.config.vocab_size)
        sample = CpuSampler(settled_seed(config), attention.read_tokens, attention.find_tokens, vocabulary)
        return CpuRunner(model, attention, state, sample, vocabulary, check, self._exchange)
