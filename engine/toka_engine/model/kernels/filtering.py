"""top_k, top_p and min_p, exact over the whole vocabulary, without a sort. Only samples that ask for them pay.

Each filter keeps the tokens at or above a threshold. With top_p alone a token is sampled without knowing it
(`top_p_rejection`); with top_k it is found among the largest logits (`top_k_gathering`). Where neither works, with a
seed or a large top_k, it is found by a search over the ordered bit patterns of all logits: how many tokens (top_k), or
how much mass (top_p), lie at or above a pivot; three pivots per pass, until at most one token lies between kept and
dropped ones. Tokens that tie with the last kept one are kept too. top_p applies to the mass that top_k left; min_p is
relative to the best token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from toka_engine.model.kernels import next_power_of_2
from toka_engine.model.kernels.device_slots import DeviceSlots
from toka_engine.model.kernels.logit_ordering import key_of, unordered
from toka_engine.model.kernels.sampling import Samples, Workspace, inverse_temperature
from toka_engine.model.kernels.top_k_gathering import cut_gathered


@triton.jit
def _tail_sums(row_ptr, vocab_size, base, scale, low, middle, high, IS_COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Return mass (IS_COUNT: number as fp32) and number of the tokens at or above each of three finite pivots."""
    sum_low = tl.zeros([BLOCK], tl.float32)
    sum_middle = tl.zeros([BLOCK], tl.float32)
    sum_high = tl.zeros([BLOCK], tl.float32)
    num_low = tl.zeros([BLOCK], tl.int32)
    num_middle = tl.zeros([BLOCK], tl.int32)
    num_high = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab_size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + index, mask=index < vocab_size, other=float("-inf")).to(tl.float32)
        num_low += (x >= low).to(tl.int32)
        num_middle += (x >= middle).to(tl.int32)
        num_high += (x >= high).to(tl.int32)
        if not IS_COUNT:
            weight = tl.exp2((x - base) * scale)
            sum_low += tl.where(x >= low, weight, 0.0)
            sum_middle += tl.where(x >= middle, weight, 0.0)
            sum_high += tl.where(x >= high, weight, 0.0)
    at_low, at_middle, at_high = tl.sum(num_low, axis=0), tl.sum(num_middle, axis=0), tl.sum(num_high, axis=0)
    if IS_COUNT:
        return at_low.to(tl.float32), at_middle.to(tl.float32), at_high.to(tl.float32), at_low, at_middle, at_high
    return tl.sum(sum_low, axis=0), tl.sum(sum_middle, axis=0), tl.sum(sum_high, axis=0), at_low, at_middle, at_high


@triton.jit
def _search(
    row_ptr, vocab_size, base, scale, lower, upper, target,
    IS_COUNT: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return a key that keeps the same tokens as the greatest one in [lower, upper) whose tail reaches `target`.

    It is `lower` if no tail does. No token is at or above `upper`. Keys are int64 scalars.
    """
    num_lower, num_upper = vocab_size, 0
    # With at most one token between the two, every key between them keeps the same tokens as `lower`.
    while (upper - lower > 1) & (num_lower - num_upper > 1):
        width = upper - lower
        first = lower + tl.maximum(width // 4, 1)  # the lower end itself gives no information
        second = lower + width // 2
        third = lower + (width * 3) // 4
        at_first, at_second, at_third, num_first, num_second, num_third = _tail_sums(
            row_ptr, vocab_size, base, scale, unordered(first, SHIFT), unordered(second, SHIFT),
            unordered(third, SHIFT), IS_COUNT, BLOCK,
        )  # fmt: skip
        above_first = at_first >= target
        above_second = at_second >= target
        above_third = at_third >= target
        upper = tl.where(above_third, upper, tl.where(above_second, third, tl.where(above_first, second, first)))
        lower = tl.where(above_third, third, tl.where(above_second, second, tl.where(above_first, first, lower)))
        num_upper = tl.where(
            above_third, num_upper, tl.where(above_second, num_third, tl.where(above_first, num_second, num_first))
        )
        num_lower = tl.where(
            above_third, num_third, tl.where(above_second, num_second, tl.where(above_first, num_first, num_lower))
        )
    return lower


@triton.jit
def _bound_top_p(base, scale, mass, top_p, vocab_size):
    """Return a lower bound of the threshold: below it all tokens together have < 0.9 of the mass that top_p drops."""
    return base - (tl.log2(vocab_size / ((1.0 - top_p) * mass)) + 0.16) / scale


@triton.jit(do_not_specialize=["num_blocks"])
def _threshold_kernel(
    logits_ptr, row_stride, vocab_size, logit_rows_ptr, slots_ptr, chosen_ptr,
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, maximum_ptr, scaled_ptr, token_ptr,
    gathered_ptr, num_gathered_ptr, threshold_ptr, num_blocks,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, ROOM: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    sample = tl.load(chosen_ptr + tl.program_id(0))
    if tl.load(token_ptr + sample) < 0:
        row_ptr = logits_ptr + tl.load(logit_rows_ptr + sample).to(tl.int64) * row_stride
        slot = tl.load(slots_ptr + sample)
        scale = inverse_temperature(temperature_ptr, slot) * 1.4426950408889634
        blocks = tl.arange(0, BLOCKS)
        in_blocks = blocks < num_blocks
        at = sample.to(tl.int64) * num_blocks + blocks
        maxima = tl.load(maximum_ptr + at, mask=in_blocks, other=float("-inf"))
        top = tl.max(maxima, axis=0)
        is_bad = (top == float("inf")) | (top == float("-inf"))
        base = tl.where(is_bad, 0.0, top)
        masses = tl.load(scaled_ptr + at, mask=in_blocks, other=0.0) * tl.exp2((maxima - base) * scale)
        mass = tl.sum(tl.where(in_blocks & (masses > 0), masses, 0.0), axis=0)
        top_k, top_p, min_p = tl.load(top_k_ptr + slot), tl.load(top_p_ptr + slot), tl.load(min_p_ptr + slot)
        upper = key_of(base, SHIFT) + 1
        key = key_of(float("-inf"), SHIFT)
        has_top_p = (top_p < 1.0) & (is_bad == 0)
        if (top_k > 0) & (top_k < vocab_size) & (is_bad == 0):
            num_gathered = tl.load(num_gathered_ptr + sample)
            if (num_gathered >= top_k) & (num_gathered <= ROOM):
                logits_of = gathered_ptr + sample.to(tl.int64) * ROOM
                key = cut_gathered(logits_of, num_gathered, base, scale, upper, top_k, top_p, ROOM, SHIFT)
                has_top_p = False
            else:
                key = _search(row_ptr, vocab_size, base, scale, key, upper, top_k.to(tl.float32), True, SHIFT, BLOCK)
                pivot = unordered(key, SHIFT)
                mass, _, _, _, _, _ = _tail_sums(row_ptr, vocab_size, base, scale, pivot, pivot, pivot, False, BLOCK)
        if has_top_p:
            key = tl.maximum(key_of(_bound_top_p(base, scale, mass, top_p, vocab_size), SHIFT) - 1, key)
            key = _search(row_ptr, vocab_size, base, scale, key, upper, mass * top_p, False, SHIFT, BLOCK)
        threshold = unordered(key, SHIFT)
        floor = base + tl.log2(tl.maximum(min_p, 1e-30)) / scale
        threshold = tl.where(min_p > 0, tl.maximum(threshold, tl.minimum(floor, base)), threshold)
        tl.store(threshold_ptr + sample, tl.where(is_bad, float("-inf"), threshold))


@triton.jit
def _masked_sums_kernel(
    logits_ptr, row_stride, vocab_size, logit_rows_ptr, slots_ptr, chosen_ptr, temperature_ptr,
    maximum_ptr, scaled_ptr, token_ptr, threshold_ptr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.load(chosen_ptr + tl.program_id(0))
    if tl.load(token_ptr + sample) < 0:
        block = tl.program_id(1)
        at = sample.to(tl.int64) * tl.num_programs(1) + block
        maximum = tl.load(maximum_ptr + at)
        threshold = tl.load(threshold_ptr + sample)
        kept = 0.0
        if maximum >= threshold:  # most blocks have nothing that is kept, and are not read
            row_ptr = logits_ptr + tl.load(logit_rows_ptr + sample).to(tl.int64) * row_stride
            inv_t = inverse_temperature(temperature_ptr, tl.load(slots_ptr + sample))
            index = block * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(row_ptr + index, mask=index < vocab_size, other=float("-inf")).to(tl.float32)
            base = tl.where((maximum == float("-inf")) | (maximum == float("inf")), 0.0, maximum)
            kept = tl.sum(tl.where(x >= threshold, tl.exp((x - base) * inv_t), 0.0), axis=0)
        tl.store(scaled_ptr + at, kept)


def apply_filters(
    logits: torch.Tensor,
    samples: Samples,
    chosen: torch.Tensor,  # [f] int32: the samples with a filter
    state: DeviceSlots,
    work: Workspace,
) -> None:
    """Set work.threshold of the chosen samples that have no token yet, and limit their work.scaled_sum to kept tokens.

    To be called after block_stats, sample_by_rejection and gather_best.
    """
    count = chosen.shape[0]
    if not count:
        return
    shift = 16 if logits.dtype == torch.bfloat16 else 0
    _threshold_kernel[(count,)](
        logits, logits.stride(0), logits.shape[1], samples.logit_rows, samples.slots, chosen,
        state["temperature"], state["top_k"], state["top_p"], state["min_p"], work.maximum, work.scaled_sum, work.token,
        work.gathered, work.num_gathered, work.threshold, work.num_blocks,
        BLOCK=work.block, BLOCKS=next_power_of_2(work.num_blocks), ROOM=work.gathered.shape[1], SHIFT=shift,
        num_warps=16,
    )  # fmt: skip
    _masked_sums_kernel[(count, work.num_blocks)](
        logits, logits.stride(0), logits.shape[1], samples.logit_rows, samples.slots, chosen,
        state["temperature"], work.maximum, work.scaled_sum, work.token, work.threshold, BLOCK=work.block, num_warps=8,
    )  # fmt: skip
