"""The peer memory of a model's GPU ranks: one region on each GPU, verified, and cut into what the kernels exchange by.

Made before the weights are loaded, so that the KV cache is fitted into what it leaves; it lives as long as the process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from toka_engine.model.cuda.peer_memory import Gather, PeerMemory
from toka_engine.model.kernels import DEPENDENT_LAUNCH_CAPABILITY
from toka_engine.model.kernels.all_reduce import EMPTY_WORD, Inboxes, count_resident_programs
from toka_engine.model.kernels.chunk_sum import NUM_TURNS, Boxes
from toka_engine.model.kernels.peer_pattern import PATTERN_WORDS
from toka_engine.model.kernels.row_gathering import NUM_BUFFERS, RowBuffers
from toka_engine.model.kernels.sharded_sampling import CandidateInboxes
from toka_engine.model.prompt_scores import PIECE_ROWS
from toka_engine.model.sharding import Sharding

_ALIGN = 256
_ROW_BYTES = 128 << 20
"""Bytes of each of the two buffers that rows of logits are gathered in: 261 rows of a vocabulary of 128 k."""


@dataclass(frozen=True, slots=True)
class LinkSizes:
    """The sizes that a model's exchanges have."""

    width: int
    """Values of a row of the residual stream."""
    max_rows: int
    """Rows of a forward, at most."""
    max_samples: int
    vocab_size: int
    overlapped_rows: int = 0
    """Rows, at most, of sums that are exchanged while a GEMM runs; 0: there are none."""

    @property
    def gathered_rows(self) -> int:
        """Rows of logits that are gathered at a time."""
        return max(1, min(max(self.max_samples, PIECE_ROWS), _ROW_BYTES // (4 * RowBuffers.row_size(self.vocab_size))))

    @property
    def row_buffer_words(self) -> int:
        return NUM_BUFFERS * self.gathered_rows * RowBuffers.row_size(self.vocab_size)


@dataclass(frozen=True, slots=True)
class PeerLinks:
    """The arguments of kernels that exchange values with the other ranks."""

    inboxes: Inboxes
    candidates: CandidateInboxes
    rows: RowBuffers
    boxes: Boxes | None
    """None: no sum is exchanged while a GEMM runs."""


def connect_peers(sharding: Sharding, sizes: LinkSizes, capability: int, gather: Gather) -> PeerLinks:
    """Allocate and verify the peer memory of all ranks, on the current device.

    Raises PeerMemoryError on every rank if GPUs cannot reach each other's memory.
    """
    rank, num_ranks, device = sharding.rank, sharding.size, torch.device("cuda", torch.cuda.current_device())
    begins = find_begins(num_ranks, sizes)
    memory = PeerMemory.open_verified(rank, num_ranks, begins[-1], gather)
    words = memory.view(torch.int32)
    words[: begins[1] // 4] = 0
    words[begins[1] // 4 : begins[3] // 4] = EMPTY_WORD
    words[begins[4] // 4 :] = 0
    torch.cuda.synchronize()
    gather(b"")  # nobody stores before all inboxes are marked as empty
    programs = count_resident_programs(device)
    return make_links(sharding, sizes, capability, programs, memory.addresses, begins, memory.view(torch.float32))


def find_begins(num_ranks: int, sizes: LinkSizes) -> list[int]:
    """Return the bytes at which flags, inboxes, candidates, rows and boxes begin in a region, and its size."""
    parts = [
        4 * num_ranks * PATTERN_WORDS,  # the pattern of `verify`, then the flags
        Inboxes.size_bytes(sizes.max_rows, sizes.width, num_ranks),
        CandidateInboxes.size_bytes(sizes.max_samples, num_ranks),
        4 * sizes.row_buffer_words,
        Boxes.size_bytes(sizes.overlapped_rows, sizes.width, num_ranks),
    ]
    begins = [0]
    for part in parts:
        begins.append(begins[-1] + -(-part // _ALIGN) * _ALIGN)
    return begins


def make_links(
    sharding: Sharding,
    sizes: LinkSizes,
    capability: int,
    max_programs: int,
    addresses: torch.Tensor,  # [num_ranks] int64
    begins: list[int],
    floats: torch.Tensor,  # this rank's region
) -> PeerLinks:
    """Cut regions at `begins`: flags, inboxes, candidates, rows and boxes begin there."""
    rank, num_ranks = sharding.rank, sharding.size
    flags, inboxes, candidates, rows = begins[:4]

    def zeros(count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int32, device=addresses.device)

    shape = NUM_BUFFERS, sizes.gathered_rows, RowBuffers.row_size(sizes.vocab_size)
    return PeerLinks(
        Inboxes(
            rank, num_ranks, sizes.max_rows, sizes.width, addresses + inboxes, zeros(sizes.max_rows), max_programs,
            capability >= DEPENDENT_LAUNCH_CAPABILITY,
        ),
        CandidateInboxes(
            rank, num_ranks, sizes.max_samples, addresses + candidates, zeros(sizes.max_samples), zeros(3),
            max_programs,
        ),
        RowBuffers(
            rank, num_ranks, sharding.split_vocabulary(sizes.vocab_size)[0], addresses + rows, addresses + flags,
            zeros(1), floats[rows // 4 : rows // 4 + sizes.row_buffer_words].view(shape), sizes.vocab_size,
        ),
        make_boxes(sharding, sizes, addresses, begins[4], floats) if sizes.overlapped_rows else None,
    )  # fmt: skip


def make_boxes(
    sharding: Sharding, sizes: LinkSizes, addresses: torch.Tensor, begin: int, floats: torch.Tensor
) -> Boxes:
    """Make the boxes that begin at byte `begin` of the regions; their flags are zeros already."""
    max_rows, width, num_ranks = sizes.overlapped_rows, sizes.width, sharding.size
    words = floats.view(torch.int32)[begin // 4 : begin // 4 + Boxes.count_words(max_rows, width, num_ranks)]
    return Boxes(
        sharding.rank,
        num_ranks,
        max_rows,
        width,
        tuple(address + begin for address in addresses.tolist()),
        words.view(NUM_TURNS, num_ranks - 1, max_rows, width // 2),
    )
