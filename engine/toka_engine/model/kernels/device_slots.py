"""A slot's parameters on the GPU, and the kernels that set and read them.

The columns are those that the table in `slot_parameters` marks `on_device`. A step changes them through one packed
array of int32, so that its inputs are a single copy from pinned memory.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from toka_engine.model.kernels import cdiv
from toka_engine.slot_parameters import SLOT_COLUMNS, Column, SlotBatch

_COLUMNS = [column for column in SLOT_COLUMNS if column.on_device]
_WORDS = [column.dtype.itemsize // 4 for column in _COLUMNS]
"""int32 words of each column's values, 1 or 2. Columns of two come first in memory."""
_NUM_LONGS = sum(words == 2 for words in _WORDS)
_NUM_SHORTS = sum(words == 1 for words in _WORDS)
_ALIGN = 16
"""Slots are allocated by as many, so that every column begins where Triton's vector loads may."""


class DeviceSlots:
    """The columns that kernels read by slot, [num_slots] each, and the last sampled token."""

    last_token: torch.Tensor  # int32: what the next decode step reads

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self.stride = cdiv(num_slots, _ALIGN) * _ALIGN
        self.words = torch.zeros(sum(_WORDS) * self.stride, dtype=torch.int32, device=device)
        """All columns in the order of `_in_memory_order`, `stride` slots each."""
        self.last_token = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self._columns: dict[str, torch.Tensor] = {}
        begin = 0
        for column in _in_memory_order():
            end = begin + self.stride * (column.dtype.itemsize // 4)
            values = self.words[begin:end].view(_TORCH_DTYPES[column.dtype])
            self._columns[column.name] = values[:num_slots].fill_(column.default)
            begin = end

    def __getitem__(self, name: str) -> torch.Tensor:
        """The column `name` [num_slots]."""
        return self._columns[name]


def _in_memory_order() -> list[Column]:
    return sorted(_COLUMNS, key=lambda column: -column.dtype.itemsize)


_TORCH_DTYPES = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64, np.dtype(np.float32): torch.float32}


def pack_new_slots(new: SlotBatch) -> NDArray[np.int32]:
    """Return what `set_slots` takes [words * n]: the slots, then word by word the columns in their order in memory."""
    words = [new.slots]
    for column in _in_memory_order():
        halves = new[column.name].astype(column.dtype.newbyteorder("<"), copy=False).view("<i4")
        words += list(halves.reshape(len(new), column.dtype.itemsize // 4).T)
    return np.concatenate(words, dtype=np.int32)


@triton.jit(do_not_specialize=["count", "stride"])
def _set_slots_kernel(
    words_ptr, count, state_ptr, stride, NUM_LONGS: tl.constexpr, NUM_SHORTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    slot = tl.load(words_ptr + index, mask=inside, other=0)
    for column in tl.static_range(NUM_LONGS):
        from_ptr, into_ptr = words_ptr + (1 + 2 * column) * count + index, state_ptr + 2 * column * stride + 2 * slot
        tl.store(into_ptr, tl.load(from_ptr, mask=inside, other=0), mask=inside)
        tl.store(into_ptr + 1, tl.load(from_ptr + count, mask=inside, other=0), mask=inside)
    for column in tl.static_range(2 * NUM_LONGS, 2 * NUM_LONGS + NUM_SHORTS):
        word = tl.load(words_ptr + (1 + column) * count + index, mask=inside, other=0)
        tl.store(state_ptr + column * stride + slot, word, mask=inside)


def set_slots(slots: DeviceSlots, words: torch.Tensor) -> None:
    """Set the columns of the slots in `words` int32 (see pack_new_slots)."""
    count = words.shape[0] // (1 + sum(_WORDS))
    if count:
        _set_slots_kernel[(cdiv(count, 128),)](
            words, count, slots.words, slots.stride, NUM_LONGS=_NUM_LONGS, NUM_SHORTS=_NUM_SHORTS, BLOCK=128,
            num_warps=4,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_decode", "rows"])
def _gather_ids_kernel(last_token_ptr, slots_ptr, tokens_ptr, out_ptr, num_decode, rows, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    is_decode = row < num_decode
    slot = tl.load(slots_ptr + row, mask=inside & is_decode, other=0)
    last = tl.load(last_token_ptr + slot, mask=inside & is_decode, other=0)
    token = tl.load(tokens_ptr + row - num_decode, mask=inside & (row >= num_decode), other=0)
    tl.store(out_ptr + row, tl.where(is_decode, last, token), mask=inside)


def gather_ids(
    state: DeviceSlots,
    slots: torch.Tensor,  # [rows] int32
    prefill_tokens: torch.Tensor,  # [rows - num_decode] int32
    num_decode: int,
    out: torch.Tensor,  # [rows] int32
) -> None:
    """The forward's input ids: each decode row's last sampled token, then the prefill tokens."""
    rows = slots.shape[0]
    if rows:
        _gather_ids_kernel[(cdiv(rows, 256),)](
            state.last_token, slots, prefill_tokens, out, num_decode, rows, BLOCK=256, num_warps=4
        )
