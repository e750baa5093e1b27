"""Sampling state on the GPU by slot, and the kernels that set and read it.

A step changes it through one packed array of int32, so that a step's inputs are a single copy from pinned memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

NUM_FIELDS = 8
"""int32 words per new slot: slot, temperature, top_p, top_k, min_p, seed (low, high), num_sampled."""


@dataclass(frozen=True, slots=True)
class SlotState:
    """What sampling knows of each slot; every tensor is [num_slots]."""

    temperature: torch.Tensor  # fp32; 0: greedy
    top_p: torch.Tensor  # fp32; 1: off
    top_k: torch.Tensor  # int32; 0: off
    min_p: torch.Tensor  # fp32; 0: off
    seed: torch.Tensor  # int64; -1: none
    num_sampled: torch.Tensor  # int32: tokens drawn so far, the counter of seeded draws
    last_token: torch.Tensor  # int32: what the next decode step reads

    @classmethod
    def allocate(cls, num_slots: int, device: torch.device) -> SlotState:
        def zeros(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(num_slots, dtype=dtype, device=device)

        return cls(
            temperature=zeros(torch.float32),
            top_p=zeros(torch.float32) + 1,
            top_k=zeros(torch.int32),
            min_p=zeros(torch.float32),
            seed=zeros(torch.int64) - 1,
            num_sampled=zeros(torch.int32),
            last_token=zeros(torch.int32),
        )


def pack_new_slots(
    slots: NDArray[np.int32],
    temperatures: NDArray[np.float32],
    top_ps: NDArray[np.float32],
    top_ks: NDArray[np.int32],
    min_ps: NDArray[np.float32],
    seeds: NDArray[np.int64],
    num_sampled: NDArray[np.int32],
) -> NDArray[np.int32]:
    """The words that `set_slots` takes: field by field, [NUM_FIELDS * n]."""
    halves = seeds.astype("<i8").view("<i4").reshape(-1, 2)
    fields = [
        slots,
        temperatures.view(np.int32),
        top_ps.view(np.int32),
        top_ks,
        min_ps.view(np.int32),
        halves[:, 0],
        halves[:, 1],
        num_sampled,
    ]
    return np.concatenate(fields, dtype=np.int32) if slots.size else np.empty(0, np.int32)


@triton.jit(do_not_specialize=["count"])
def _set_slots_kernel(
    words_ptr, count, temperature_ptr, top_p_ptr, top_k_ptr, min_p_ptr, seed_ptr, num_sampled_ptr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    slot = tl.load(words_ptr + index, mask=inside, other=0)
    temperature = tl.load(words_ptr + count + index, mask=inside, other=0)
    top_p = tl.load(words_ptr + 2 * count + index, mask=inside, other=0)
    top_k = tl.load(words_ptr + 3 * count + index, mask=inside, other=0)
    min_p = tl.load(words_ptr + 4 * count + index, mask=inside, other=0)
    low = tl.load(words_ptr + 5 * count + index, mask=inside, other=0).to(tl.int64)
    high = tl.load(words_ptr + 6 * count + index, mask=inside, other=0).to(tl.int64)
    num_sampled = tl.load(words_ptr + 7 * count + index, mask=inside, other=0)
    tl.store(temperature_ptr + slot, temperature.to(tl.float32, bitcast=True), mask=inside)
    tl.store(top_p_ptr + slot, top_p.to(tl.float32, bitcast=True), mask=inside)
    tl.store(top_k_ptr + slot, top_k, mask=inside)
    tl.store(min_p_ptr + slot, min_p.to(tl.float32, bitcast=True), mask=inside)
    tl.store(seed_ptr + slot, (high << 32) | (low & 0xFFFFFFFF), mask=inside)
    tl.store(num_sampled_ptr + slot, num_sampled, mask=inside)


def set_slots(state: SlotState, words: torch.Tensor) -> None:
    """Set the sampling fields of the slots in `words` [NUM_FIELDS * n] int32 (see pack_new_slots)."""
    count = words.shape[0] // NUM_FIELDS
    if count:
        _set_slots_kernel[(triton.cdiv(count, 128),)](
            words, count, state.temperature, state.top_p, state.top_k, state.min_p, state.seed,
            state.num_sampled, BLOCK=128, num_warps=4,
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
    state: SlotState,
    slots: torch.Tensor,  # [rows] int32
    prefill_tokens: torch.Tensor,  # [rows - num_decode] int32
    num_decode: int,
    out: torch.Tensor,  # [rows] int32
) -> None:
    """The forward's input ids: each decode row's last sampled token, then the prefill tokens."""
    rows = slots.shape[0]
    if rows:
        _gather_ids_kernel[(triton.cdiv(rows, 256),)](
            state.last_token, slots, prefill_tokens, out, num_decode, rows, BLOCK=256, num_warps=4
        )
