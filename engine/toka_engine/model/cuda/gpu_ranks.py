"""Tensor-parallel ranks on the GPUs of one host: processes that meet by a file and then exchange over peer memory.

Where the GPUs cannot read and write each other's memory, NCCL carries what they exchange: slower, and launched kernel
by kernel, but the same tokens. That is found out at the start, before weights are read.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from toka_engine.config import EngineConfig
from toka_engine.model.cuda.nccl_exchange import NcclExchange
from toka_engine.model.cuda.overlapped_sums import OverlappedSums, StreamQueue
from toka_engine.model.cuda.peer_links import LinkSizes, connect_peers
from toka_engine.model.cuda.peer_memory import PeerMemoryError
from toka_engine.model.cuda.rendezvous import Rendezvous
from toka_engine.model.cuda.tensor_parallel import NcclParallel, PeerParallel, TensorParallel
from toka_engine.model.model_config import ModelConfig
from toka_engine.model.sharding import Sharding
from toka_engine.model.sizing import choose_step_sizes

logger = logging.getLogger("toka.model")

NO_PEER_MEMORY = "TOKA_NO_PEER_MEMORY"
"""The variable that keeps ranks from peer memory, for tests and for hosts whose driver is not to be trusted with it."""


class GpuRanks:
    """A ranks.Ranks of processes, each with its own GPU as the current device."""

    def __init__(self, meeting: Path, rank: int, size: int) -> None:
        """Meet the other ranks by the file `meeting`, which no earlier start has used.

        Raises PeerClosedError, StorageError.
        """
        self.rank, self.size = rank, size
        self._rendezvous = Rendezvous(meeting, rank, size)
        self.agree_min(0)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """See ranks.Ranks."""
        raise AssertionError("the all-reduce of GPU ranks is fused with the add and the norm behind it")

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """See ranks.Ranks."""
        raise AssertionError("GPU ranks gather nothing but what their sampler gathers")

    def agree_min(self, value: int) -> int:
        """See ranks.Ranks."""
        return self._rendezvous.agree_min(value)

    def connect(self, config: EngineConfig, model: ModelConfig, capability: int) -> TensorParallel:
        """Make what the ranks of `model` exchange values by. `capability`: the GPU's, as 90."""
        sharding = Sharding(self.rank, self.size)
        max_seqs, max_tokens = choose_step_sizes(config, is_gpu=True)
        max_rows, threshold = max(max_seqs, max_tokens), config.async_tp_threshold
        overlapped_rows = max_rows if threshold is not None and threshold <= max_rows else 0
        sizes = LinkSizes(model.hidden_size, max_rows, max_seqs, model.vocab_size, overlapped_rows)
        begin, end = sharding.split_vocabulary(model.vocab_size)
        gather = self._rendezvous.gather
        try:
            if self.agree_min(int(NO_PEER_MEMORY not in os.environ)) == 0:
                raise PeerMemoryError(f"{NO_PEER_MEMORY} is set")
            links = connect_peers(sharding, sizes, capability, gather)
        except PeerMemoryError as error:  # on every rank, if on one
            if self.rank == 0:
                logger.warning("event=no_peer_memory reason=%r instead=nccl cudagraphs=F", str(error))
            return NcclParallel(NcclExchange(sharding, gather), sharding, model.vocab_size, self.agree_min)
        sums = None
        if links.boxes is not None and threshold is not None:
            sums = OverlappedSums(links.boxes, threshold, StreamQueue())
            if self.rank == 0:
                logger.info("event=async_tp threshold=%d max_rows=%d", threshold, max_rows)
        return PeerParallel(links, end - begin, self.agree_min, sums)
