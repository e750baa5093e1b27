"""A GPU rank and the other ranks of its replica share agreed sizes, the sums of the forward, and the sampler.

Peer memory carries values between ranks while they run. Where GPUs cannot reach each other's memory, NCCL does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from toka_engine.model.cuda.attention import CudaAttention
from toka_engine.model.cuda.nccl_exchange import GatheringSampler, NcclExchange
from toka_engine.model.cuda.overlapped_sums import OverlappedSums
from toka_engine.model.cuda.peer_links import PeerLinks
from toka_engine.model.cuda.sampler import Sampler
from toka_engine.model.cuda.sharded_sampler import ShardedSampler
from toka_engine.model.kernels.all_reduce import all_reduce_add_rms_norm
from toka_engine.model.kernels.device_slots import DeviceSlots
from toka_engine.model.kernels.norm import add_rms_norm
from toka_engine.model.ops import BegunSum, Gemm
from toka_engine.model.sharding import Sharding


class TensorParallel(Protocol):
    """One rank's part in the exchanges of a replica. All ranks call the same methods in the same order."""

    @property
    def width(self) -> int:
        """Tokens of this rank's part of the vocabulary."""
        ...

    @property
    def has_graphs(self) -> bool:
        """Whether the exchanges can be captured in CUDA graphs."""
        ...

    @property
    def agree_min(self) -> Callable[[int], int]:
        """Gives the smallest of all ranks' values. It waits on the host; never while steps run."""
        ...

    @property
    def begin_sum(self) -> Callable[[torch.Tensor, Gemm], BegunSum | None] | None:
        """See ops.Ops."""
        ...

    def all_reduce_add_rms_norm(
        self, partial: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """See ops.Ops."""
        ...

    def make_sampler(self, seed: int, state: DeviceSlots, attention: CudaAttention, max_samples: int) -> Sampler:
        """Make the sampler of this rank's part of the vocabulary."""
        ...


@dataclass(frozen=True, slots=True)
class PeerParallel:
    """A TensorParallel over peer memory."""

    links: PeerLinks
    width: int
    agree_min: Callable[[int], int]
    sums: OverlappedSums | None = None
    """None: no sum is exchanged while a GEMM runs."""
    has_graphs: bool = True

    @property
    def begin_sum(self) -> Callable[[torch.Tensor, Gemm], BegunSum | None] | None:
        """See TensorParallel."""
        return None if self.sums is None else self.sums.begin

    def all_reduce_add_rms_norm(
        self, partial: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """See TensorParallel."""
        return all_reduce_add_rms_norm(partial, residual, weight, eps, self.links.inboxes)

    def make_sampler(self, seed: int, state: DeviceSlots, attention: CudaAttention, max_samples: int) -> Sampler:
        """See TensorParallel."""
        return ShardedSampler(seed, state, attention, max_samples, self.links, self.width)


@dataclass(frozen=True, slots=True)
class NcclParallel:
    """A TensorParallel over NCCL."""

    exchange: NcclExchange
    sharding: Sharding
    vocab_size: int
    agree_min: Callable[[int], int]
    has_graphs: bool = False
    begin_sum: None = None

    @property
    def width(self) -> int:
        """See TensorParallel."""
        begin, end = self.sharding.split_vocabulary(self.vocab_size)
        return end - begin

    def all_reduce_add_rms_norm(
        self, partial: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """See TensorParallel."""
        return add_rms_norm(self.exchange.all_reduce(partial), residual, weight, eps)

    def make_sampler(self, seed: int, state: DeviceSlots, attention: CudaAttention, max_samples: int) -> Sampler:
        """See TensorParallel."""
        return GatheringSampler(self.exchange, self.sharding, self.vocab_size, seed, state, attention, max_samples)
