"""A step's inputs from the host, and its tokens on their way back, without a copy: kernels read and write host memory.

A copy, its event and the launches around it cost the host more than a step of few rows may take. So all that such a
step has to be told is one packet in pinned memory, which the step's first kernel takes; its last kernel publishes the
tokens there. Packets and results lie in rings, and how many packets were taken is counted on the device: a CUDA graph,
whose addresses are fixed, finds its own.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from toka_engine.model.kernels.device_slots import DeviceSlots

RING = 4
"""Packets that may be on their way. More than the steps in flight."""
_COUNT_MASK = tl.constexpr((1 << 30) - 1)
"""Packets are counted in int32, to a multiple of RING: at a thousand steps a second 31 bits last for 25 days."""
_HEADER = 8
"""int32 words: how many pages are appended, one unused, then random as two int64. Then six arrays [max_rows], and words
of groups."""
_RANDOM = 2
_NUM_ARRAYS = 6
_BLOCK = 128
"""Rows at a time."""


class Packets:
    """The rings, and what a packet is unpacked to: arrays at fixed addresses, for up to `max_rows` rows."""

    def __init__(self, max_rows: int, group_words: int, padding_slot: int, device: torch.device) -> None:
        """`padding_slot`: the slot of rows that a packet does not fill; their position is 0.

        `group_words`: int32 words that describe the groups of a step (see prefix_groups).
        """
        is_cuda, words = device.type == "cuda", _HEADER + _NUM_ARRAYS * max_rows + group_words
        self.max_rows, self._padding_slot = max_rows, padding_slot
        self._ring = torch.zeros((RING, words), dtype=torch.int32, pin_memory=is_cuda, device=_host(device))
        self._results = torch.zeros((RING, max_rows), dtype=torch.int32, pin_memory=is_cuda, device=_host(device))
        self._num_taken = torch.zeros(1, dtype=torch.int32, device=device)
        self._num_written = 0
        if device.type != "meta":
            self._words, self._tokens = self._ring.numpy(), self._results.numpy()
        self.slots, self.positions, self.starts, self.ids, self.drawn = (
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
        """Lay the packet that the next `take`, of `size` rows, finds; returns its place in the ring.

        `starts` and `groups`: where a take with groups follows.

        Whatever was launched RING packets ago must be done.
        """
        place = self._num_written % RING
        self._num_written += 1
        words, max_rows = self._words[place], self.max_rows
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
        return place

    def tokens(self, place: int, count: int) -> NDArray[np.int32]:
        """[count] int32 that `publish` wrote for the packet at this place of the ring; a view."""
        tokens: NDArray[np.int32] = self._tokens[place, :count]
        return tokens

    def take(
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
        _take_kernel[(1,)](
            self._ring, self._num_taken, state.last_token, block_table, block_table.shape[1], page_tokens,
            self.slots, self.positions, self.starts, self.ids, self.random, self.groups,
            size, self.max_rows, self.groups.shape[0],
            BLOCK=_BLOCK, PAGE_SIZE=page_tokens.shape[1], HEADER=_HEADER, NUM_ARRAYS=_NUM_ARRAYS, RING_SIZE=RING,
            HAS_GROUPS=has_groups, num_warps=_BLOCK // 32,
        )  # fmt: skip

    def publish(self, size: int) -> None:
        """Write the first `size` of `drawn` to the results, for the packet that was taken last."""
        _publish_kernel[(triton.cdiv(size, _BLOCK),)](
            self._results, self._num_taken, self.drawn, size, self.max_rows,
            BLOCK=_BLOCK, RING_SIZE=RING, num_warps=_BLOCK // 32,
        )  # fmt: skip


def _host(device: torch.device) -> torch.device:
    """Of memory that the host writes; a rehearsal has none."""
    return device if device.type == "meta" else torch.device("cpu")


# One program, because pages must be in the table before their tokens are noted, and the packet is taken once.
@triton.jit(do_not_specialize=["columns", "size", "max_rows", "group_words"])
def _take_kernel(
    ring_ptr, num_taken_ptr, last_token_ptr, table_ptr, columns, page_tokens_ptr,
    slots_ptr, positions_ptr, starts_ptr, ids_ptr, random_ptr, groups_ptr, size, max_rows, group_words,
    BLOCK: tl.constexpr, PAGE_SIZE: tl.constexpr, HEADER: tl.constexpr, NUM_ARRAYS: tl.constexpr,
    RING_SIZE: tl.constexpr, HAS_GROUPS: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BLOCK)
    taken = tl.load(num_taken_ptr)
    packet = ring_ptr + (taken % RING_SIZE) * (HEADER + NUM_ARRAYS * max_rows + group_words)
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
            own = tl.load(rows_at + start + (NUM_ARRAYS - 1) * max_rows, mask=inside, other=0, volatile=True)
            tl.store(starts_ptr + start + row, own, mask=inside)
    if HAS_GROUPS:
        for start in range(0, group_words, BLOCK):
            inside = start + row < group_words
            group = tl.load(rows_at + NUM_ARRAYS * max_rows + start, mask=inside, other=0, volatile=True)
            tl.store(groups_ptr + start + row, group, mask=inside)
    tl.store(num_taken_ptr, (taken + 1) & _COUNT_MASK)


@triton.jit(do_not_specialize=["size", "max_rows"])
def _publish_kernel(
    results_ptr, num_taken_ptr, drawn_ptr, size, max_rows, BLOCK: tl.constexpr, RING_SIZE: tl.constexpr
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = (tl.load(num_taken_ptr) + RING_SIZE - 1) % RING_SIZE
    tl.store(results_ptr + place * max_rows + row, tl.load(drawn_ptr + row, mask=row < size), mask=row < size)
