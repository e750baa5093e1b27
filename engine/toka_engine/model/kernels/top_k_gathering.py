"""Gathers the largest logits of samples with top_k in one pass; the threshold is then found among those few.

block_stats left each block's maximum. If k blocks have a maximum >= x, at least k tokens are >= x; so the k-th largest
block maximum is a lower bound of the top_k threshold, and a tight one. Blocks whose maximum is below it are not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from toka_engine.model.kernels import next_power_of_2
from toka_engine.model.kernels.device_slots import DeviceSlots
from toka_engine.model.kernels.logit_ordering import key_of, ordered
from toka_engine.model.kernels.sampling import Samples, Workspace


@triton.jit
def _bound(maxima, in_blocks, top, top_k):
    """Return a logit that at least top_k tokens reach; if top_k exceeds the number of blocks, only probably."""
    num_better = tl.sum((maxima[None, :] > maxima[:, None]).to(tl.int32), axis=1)
    bound = tl.min(tl.where(in_blocks & (num_better < top_k), maxima, float("inf")), axis=0)
    is_guess = top_k > tl.sum(in_blocks.to(tl.int32), axis=0)
    return tl.where(is_guess, bound - (top - bound) * 0.25, bound)


@triton.jit
def _gather_kernel(
    logits_ptr, row_stride, vocab_size, logit_rows_ptr, slots_ptr, chosen_ptr, top_k_ptr, maximum_ptr,
    gathered_ptr, num_gathered_ptr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs read neighbouring blocks.
    block = tl.program_id(0)
    sample = tl.load(chosen_ptr + tl.program_id(1))
    top_k = tl.load(top_k_ptr + tl.load(slots_ptr + sample))
    if (top_k > 0) & (top_k <= ROOM):
        blocks = tl.arange(0, BLOCKS)
        in_blocks = blocks < tl.num_programs(0)
        at = sample.to(tl.int64) * tl.num_programs(0) + blocks
        maxima = tl.load(maximum_ptr + at, mask=in_blocks, other=float("-inf"))
        top = tl.max(maxima, axis=0)
        bound = _bound(maxima, in_blocks, top, top_k)
        best = tl.max(tl.where(blocks == block, maxima, float("-inf")), axis=0)
        if (best >= bound) & (top < float("inf")) & (top > float("-inf")):
            row_ptr = logits_ptr + tl.load(logit_rows_ptr + sample).to(tl.int64) * row_stride
            index = block * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(row_ptr + index, mask=index < vocab_size, other=float("-inf")).to(tl.float32)
            is_good = ((x >= bound) & (index < vocab_size)).to(tl.int32)
            begin = tl.atomic_add(num_gathered_ptr + sample, tl.sum(is_good, axis=0))
            place = begin + tl.cumsum(is_good, axis=0) - 1
            into_ptr = gathered_ptr + sample.to(tl.int64) * ROOM
            tl.store(into_ptr + place, x, mask=(is_good > 0) & (place < ROOM))


@triton.jit
def _find_threshold(keys, weights, lower, upper, target):
    """Return the greatest key in [lower, upper) whose tail of `weights` [ROOM] reaches `target`, or `lower`."""
    while upper - lower > 1:
        middle = lower + (upper - lower) // 2
        is_enough = tl.sum(tl.where(keys >= middle, weights, 0), axis=0) >= target
        lower = tl.where(is_enough, middle, lower)
        upper = tl.where(is_enough, upper, middle)
    return lower


@triton.jit
def cut_gathered(into_ptr, count, base, scale, upper, top_k, top_p, ROOM: tl.constexpr, SHIFT: tl.constexpr):
    """Return the lowest key that top_k, then top_p keep, of `count` >= top_k gathered logits, all below `upper`.

    Masses are added as integers, in units of 2 ** -40 of the best token's: logits are gathered in any order, and a
    seeded sample must not depend on it.
    """
    place = tl.arange(0, ROOM)
    x = tl.load(into_ptr + place, mask=place < count, other=float("-inf"))
    keys = ordered(x, SHIFT)
    lower = key_of(tl.min(tl.where(place < count, x, float("inf")), axis=0), SHIFT)
    key = _find_threshold(keys, (place < count).to(tl.int32), lower, upper, top_k)
    if top_p < 1.0:
        masses = (tl.exp2((x - base) * scale) * 1099511627776.0).to(tl.int64)
        kept = tl.sum(tl.where(keys >= key, masses, 0), axis=0)
        key = _find_threshold(keys, masses, key, upper, (kept.to(tl.float64) * top_p).to(tl.int64))
    return key


def gather_best(
    logits: torch.Tensor,
    samples: Samples,
    chosen: torch.Tensor,  # [f] int32: the samples with a filter
    state: DeviceSlots,
    work: Workspace,
) -> None:
    """Set work.num_gathered and work.gathered of the chosen samples that have top_k. To be called after block_stats.

    They are usable where work.num_gathered is at least top_k and work.gathered has room for it.
    """
    if chosen.shape[0]:
        _gather_kernel[(work.num_blocks, chosen.shape[0])](
            logits, logits.stride(0), logits.shape[1], samples.logit_rows, samples.slots, chosen, state["top_k"],
            work.maximum, work.gathered, work.num_gathered,
            BLOCK=work.block, BLOCKS=next_power_of_2(work.num_blocks), ROOM=work.gathered.shape[1], num_warps=8,
        )  # fmt: skip
