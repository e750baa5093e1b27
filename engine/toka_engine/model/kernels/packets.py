"""A decode step's inputs and its sampled tokens in pinned host memory, which kernels read and write without a copy.

A copy, its event and the launches around it cost the host more than a step of few rows may take. So such a step gets
all its inputs in one packet, which its first kernel unpacks; its last kernel writes the tokens to a result buffer.
Packets and results are rings, and the number of unpacked packets is counted on the device: a CUDA graph, whose
addresses are fixed, finds its own.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from toka_engine.model.in_flight import RING_SIZE
from toka_engine.model.kernels import cdiv
from toka_engine.model.kernels.device_slots import DeviceSlots

_COUNT_MASK = tl.constexpr((1 << 30) - 1)
"""Packets are counted in int32, to a multiple of RING_SIZE: at a thousand steps a second 31 bits last for 25 days."""
_HEADER = 8
"""int32 words before a packet's arrays: number of appended pages, one unused, then two int64 of random. After them come
six arrays [max_rows] and the words of groups."""
_RANDOM = 2
_NUM_ARRAYS = 6
_BLOCK = 128
"""Rows per iteration, and threads per program."""


class Packets:
    """The rings, and the arrays at fixed addresses that a packet is unpacked to, for up to `max_rows` rows."""

    def __init__(self, max_rows: int, group_words: int, padding_slot: int, device: torch.device) -> None:
        """`padding_slot`: the slot of rows that a packet does not fill; their position is 0.

        `group_words`: int32 words that describe the groups of a step (see prefix_groups).
        """
        is_cuda, words = device.type == "cuda", _HEADER + _NUM_ARRAYS * max_rows + group_words
        self.max_rows, self._padding_slot = max_rows, padding_slot
        self._ring = torch.zeros((RING_SIZE, words), dtype=torch.int32, pin_memory=is_cuda, device=_host(device))
        self._results = torch.zeros((RING_SIZE, max_rows), dtype=torch.int32, pin_memory=is_cuda, device=_host(device))
        self._num_unpacked = torch.zeros(1, dtype=torch.int32, device=device)
        self._num_written = 0
        if device.type != "meta":
            self._words, self._tokens = self._ring.numpy(), self._results.numpy()
        self.slots, self.positions, self.starts, self.ids, self.sampled_ids = (
            torch.zeros(max_rows, dtype=torch.int32, device=device) for _ in range(5)
        )
        self.groups = torch.zeros(group_words, dtype=torch.int32, device=device)
        self.random = torch.zeros(2, dtype=torch.int64, device=device)

    def write(
        self,
        size: int,  # rows <= size <= max_rows
        slots: NDArray[np.int32],  # [rows]
        positions: NDArray[np.int32],  # [rows]
        appends: tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]],  # slots, columns, pages
        random: NDArray[np.int32],  # [4]
        starts: NDArray[np.int32] | None = None,  # [rows]
        groups: NDArray[np.int32] | None = None,  # [group_words]
    ) -> int:
        """Write the packet for the next `unpack`, of `size` rows, and return its ring index.

        `starts` and `groups` are given if that unpack has groups. Whatever was launched RING_SIZE packets ago must be
        done.
        """
        ring_index = self._num_written % RING_SIZE
        self._num_written += 1
        words, max_rows = self._words[ring_index], self.max_rows
        words[0] = appends[0].size
        words[_RANDOM:6] = random
        for index, array in enumerate((slots, positions, *appends)):
            begin = _HEADER + index * max_rows
            words[begin : begin + array.size] = array
        words[_HEADER + slots.size : _HEADER + size] = self._padding_slot
        words[_HEADER + max_rows + slots.size : _HEADER + max_rows + size] = 0
        if starts is not None and groups is not None:
            begin, end = _HEADER + (_NUM_ARRAYS - 1) * max_rows, _HEADER + _NUM_ARRAYS * max_rows
            words[begin : begin + starts.size] = starts
            words[begin + starts.size : begin + size] = 0
            words[end:] = groups
        return ring_index

    def tokens(self, ring_index: int, count: int) -> NDArray[np.int32]:
        """Return a view [count] int32 of what `write_results` wrote for the packet at this ring index."""
        tokens: NDArray[np.int32] = self._tokens[ring_index, :count]
        return tokens

    def unpack(
        self,
        size: int,
        state: DeviceSlots,
        block_table: torch.Tensor,
        page_tokens: torch.Tensor,
        has_groups: bool = False,
    ) -> None:
        """Unpack the next packet: append its pages to `block_table`, set the first `size` slots, positions and ids
        (each slot's last token) and random, and note the ids in `page_tokens` [pages, page_size] as the tokens at these
        positions; with groups, set `groups` and the first `size` starts.
        """
        _unpack_kernel[(1,)](
            self._ring, self._num_unpacked, state.last_token, block_table, block_table.shape[1], page_tokens,
            self.slots, self.positions, self.starts, self.ids, self.random, self.groups,
            size, self.max_rows, self.groups.shape[0],
            BLOCK=_BLOCK, PAGE_SIZE=page_tokens.shape[1], HEADER=_HEADER, NUM_ARRAYS=_NUM_ARRAYS, RING_SIZE=RING_SIZE,
            HAS_GROUPS=has_groups, num_warps=_BLOCK // 32,
        )  # fmt: skip

    def write_results(self, size: int) -> None:
        """Write the first `size` of `sampled_ids` to the results, for the packet that was unpacked last."""
        _write_results_kernel[(cdiv(size, _BLOCK),)](
            self._results, self._num_unpacked, self.sampled_ids, size, self.max_rows,
            BLOCK=_BLOCK, RING_SIZE=RING_SIZE, num_warps=_BLOCK // 32,
        )  # fmt: skip


def _host(device: torch.device) -> torch.device:
    """Return the device of memory that the host writes; a dry run has none."""
    return device if device.type == "meta" else torch.device("cpu")


# One program, because pages must be in the table before their tokens are noted, and the packet is unpacked once.
@triton.jit(do_not_specialize=["columns", "size", "max_rows", "group_words"])
def _unpack_kernel(
    ring_ptr, num_unpacked_ptr, last_token_ptr, table_ptr, columns, page_tokens_ptr,
    slots_ptr, positions_ptr, starts_ptr, ids_ptr, random_ptr, groups_ptr, size, max_rows, group_words,
    BLOCK: tl.constexpr, PAGE_SIZE: tl.constexpr, HEADER: tl.constexpr, NUM_ARRAYS: tl.constexpr,
    RING_SIZE: tl.constexpr, HAS_GROUPS: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BLOCK)
    unpacked = tl.load(num_unpacked_ptr)
    packet = ring_ptr + (unpacked % RING_SIZE) * (HEADER + NUM_ARRAYS * max_rows + group_words)
    # Volatile: the host writes here between launches, which no cache may hide.
    num_appends = tl.load(packet, volatile=True)
    word = tl.arange(0, 4)
    random = tl.load(packet + 2 + word, volatile=True)
    appends_at = packet + HEADER + 2 * max_rows + row
    for start in range(0, num_appends, BLOCK):
        inside = start + row < num_appends
        slot = tl.load(appends_at + start, mask=inside, other=0, volatile=True).to(tl.int64)
        column = tl.load(appends_at + start + max_rows, mask=inside, other=0, volatile=True)
        page = tl.load(appends_at + start + 2 * max_rows, mask=inside, other=0, volatile=True)
        tl.store(table_ptr + slot * columns + column, page, mask=inside)
    tl.store(random_ptr.to(tl.pointer_type(tl.int32)) + word, random)
    tl.debug_barrier()  # other threads appended the pages, and all have read the counter
    rows_at = packet + HEADER + row
    for start in range(0, size, BLOCK):
        inside = start + row < size
        slot = tl.load(rows_at + start, mask=inside, other=0, volatile=True)
        position = tl.load(rows_at + start + max_rows, mask=inside, other=0, volatile=True)
        last = tl.load(last_token_ptr + slot, mask=inside, other=0)
        page = tl.load(table_ptr + slot.to(tl.int64) * columns + position // PAGE_SIZE, mask=inside, other=0)
        tl.store(slots_ptr + start + row, slot, mask=inside)
        tl.store(positions_ptr + start + row, position, mask=inside)
        tl.store(ids_ptr + start + row, last, mask=inside)
        tl.store(page_tokens_ptr + page.to(tl.int64) * PAGE_SIZE + position % PAGE_SIZE, last, mask=inside)
        if HAS_GROUPS:
            start_of = tl.load(rows_at + start + (NUM_ARRAYS - 1) * max_rows, mask=inside, other=0, volatile=True)
            tl.store(starts_ptr + start + row, start_of, mask=inside)
    if HAS_GROUPS:
        for start in range(0, group_words, BLOCK):
            inside = start + row < group_words
            group = tl.load(rows_at + NUM_ARRAYS * max_rows + start, mask=inside, other=0, volatile=True)
            tl.store(groups_ptr + start + row, group, mask=inside)
    tl.store(num_unpacked_ptr, (unpacked + 1) & _COUNT_MASK)


@triton.jit(do_not_specialize=["size", "max_rows"])
def _write_results_kernel(
    results_ptr, num_unpacked_ptr, sampled_ids_ptr, size, max_rows, BLOCK: tl.constexpr, RING_SIZE: tl.constexpr
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ring_index = (tl.load(num_unpacked_ptr) + RING_SIZE - 1) % RING_SIZE
    tl.store(
        results_ptr + ring_index * max_rows + row, tl.load(sampled_ids_ptr + row, mask=row < size), mask=row < size
    )
