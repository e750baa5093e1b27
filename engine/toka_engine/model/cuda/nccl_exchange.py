"""The way of GPU ranks that cannot reach each other's memory: NCCL gathers what they exchange.

It is slower, launched kernel by kernel, and gives the same tokens: sums are made of gathered parts in rank order, and
all logits are gathered, so that the sampler of one GPU runs on every rank. NCCL listens on the loopback interface
alone.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from numpy.typing import NDArray

from toka_engine.errors import DeviceUnavailableError
from toka_engine.model.cuda.attention import CudaAttention
from toka_engine.model.cuda.nccl import Nccl, NcclError
from toka_engine.model.cuda.peer_memory import Gather
from toka_engine.model.cuda.sampler import CudaSampler
from toka_engine.model.kernels.device_slots import DeviceSlots
from toka_engine.model.prompt_scores import PIECE_ROWS
from toka_engine.model.ranks import sum_in_order
from toka_engine.model.sample_plan import Sampled, SamplePlan
from toka_engine.model.sharding import Sharding
from toka_engine.model.slot_state import HostSlots

_SETTINGS = {
    "NCCL_P2P_DISABLE": "1",  # the peers' memory has just been found out of reach
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_IB_DISABLE": "1",
    "NCCL_RAS_ENABLE": "0",  # it would open a port
    "NCCL_MAX_NCHANNELS": "2",
}
"""Variables for NCCL, where the user has set none."""
_SHARED_MEMORY = "/dev/shm"
_SHARED_BYTES_PER_RANK = 24 << 20
"""Bytes of shared memory that two channels take."""


class NcclExchange:
    """Gathers tensors of several ranks. All ranks call the same methods in the same order."""

    def __init__(self, sharding: Sharding, gather: Gather) -> None:
        """Connect the ranks. Raises DeviceUnavailableError, on the ranks that notice."""
        self._rank, self._size = sharding.rank, sharding.size
        _check_shared_memory(self._size)
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        try:
            self._nccl = Nccl()
            own = self._nccl.make_id() if self._rank == 0 else b""
            self._nccl.connect(gather(own)[0], self._rank, self._size)
            self.gather(torch.zeros(1, dtype=torch.int32, device="cuda"))
            torch.cuda.synchronize()
        except (NcclError, RuntimeError) as error:
            raise DeviceUnavailableError(
                f"the GPUs of {self._size} ranks reach each other neither directly nor by NCCL: "
                f"{str(error).splitlines()[0]}"
            ) from error

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Return every rank's `x`, of one shape, in rank order: [size, *x.shape]."""
        parts = x.new_empty((self._size, *x.shape))
        if x.numel():
            self._nccl.all_gather(x.contiguous(), parts)
        return parts

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """See ranks.Ranks."""
        return sum_in_order(self.gather(x))


class GatheringSampler:
    """A cuda.sampler.Sampler that gathers all logits and samples as one GPU does."""

    max_whole_rows = PIECE_ROWS

    def __init__(
        self,
        exchange: NcclExchange,
        sharding: Sharding,
        vocab_size: int,
        seed: int,
        state: DeviceSlots,
        attention: CudaAttention,
        max_samples: int,
    ) -> None:
        self._exchange, self._vocab_size = exchange, vocab_size
        _, self._largest = Sharding(0, sharding.size).split_vocabulary(vocab_size)
        self._whole = CudaSampler(seed, state, attention, max_samples, vocab_size)

    def __call__(
        self, logits: torch.Tensor, logit_rows: torch.Tensor | None, plan: SamplePlan, state: HostSlots
    ) -> Sampled:
        """logits [n, width] fp32; see sample_plan.Sample."""
        return self._whole(self.widen(logits), logit_rows, plan, state)

    def next_random(self) -> NDArray[np.int32]:
        """See Sampler."""
        return self._whole.next_random()

    def sample_plain(self, logits: torch.Tensor, slots: torch.Tensor, random: torch.Tensor, ids: torch.Tensor) -> None:
        """See Sampler."""
        self._whole.sample_plain(self.widen(logits), slots, random, ids)

    def check(self, ids: NDArray[np.int32]) -> None:
        """See Sampler: ranks that had different steps in hand would wait for each other."""

    def widen(self, logits: torch.Tensor) -> torch.Tensor:
        """See Sampler."""
        padded = torch.nn.functional.pad(logits, (0, self._largest - logits.shape[1]))
        whole = self._exchange.gather(padded).permute(1, 0, 2).flatten(1)
        return whole[:, : self._vocab_size]


def _check_shared_memory(num_ranks: int) -> None:
    """Raise DeviceUnavailableError if NCCL would find too little shared memory, which it reports badly."""
    try:
        found = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return
    free, needed = found.f_bavail * found.f_frsize, num_ranks * _SHARED_BYTES_PER_RANK
    if free < needed:
        raise DeviceUnavailableError(
            f"{free >> 20} MB of {_SHARED_MEMORY} are free, {num_ranks} GPU ranks without peer access need "
            f"{needed >> 20} MB: give the container more (docker run --shm-size)"
        )
