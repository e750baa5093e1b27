"""Rejection sampling under top_p (and min_p): usually one pass over a sample's logits, without a search.

A token is sampled from the whole distribution. It is accepted if top_p keeps it, which one pass decides: it sums the
mass of the tokens above it. If not, top_p drops all tokens at or below it, too, and the next one is sampled from those
above. The accepted token has the filtered distribution, because each proposal comes from a superset of the kept tokens
with the same weights. (flashinfer's sampling kernels do the same.) The first proposal is accepted with probability
top_p.

Samples with a seed need the threshold itself, min_p alone gives it directly, and top_k finds it among few logits: see
`filtering`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from toka_engine.model.kernels import next_power_of_2
from toka_engine.model.kernels.device_slots import DeviceSlots
from toka_engine.model.kernels.sampling import Samples, Workspace, find_passing, inverse_temperature


@triton.jit
def _needs_limit(top_k, top_p, seed):
    """Whether a filtered sample needs its threshold (`filtering`) and does not use rejection."""
    return (seed >= 0) | (top_k > 0) | (top_p >= 1.0)


@triton.jit
def _load_block(row_ptr, vocab_size, block, BLOCK: tl.constexpr):
    """Load the logits [BLOCK] of a block as fp32; -inf beyond the vocabulary."""
    index = block * BLOCK + tl.arange(0, BLOCK)
    return tl.load(row_ptr + index, mask=index < vocab_size, other=float("-inf")).to(tl.float32)


@triton.jit
def _weigh_above(x, value, base, scale):
    """Return the weight [BLOCK] of each logit above `value`, relative to one at `base`; 0 at or below."""
    return tl.where(x > value, tl.exp2((x - base) * scale), 0.0)


@triton.jit
def _sum_above(row_ptr, vocab_size, num_blocks, value, base, scale, BLOCK: tl.constexpr):
    """Return the mass of the tokens above `value`."""
    mass = tl.zeros([BLOCK], tl.float32)
    for block in range(num_blocks):
        x = _load_block(row_ptr, vocab_size, block, BLOCK)
        mass += _weigh_above(x, value, base, scale)
    return tl.sum(mass, axis=0)


@triton.jit
def _sum_blocks_above(
    row_ptr, vocab_size, num_blocks, value, base, scale, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """Return the mass of the tokens above `value` by block, [BLOCKS] fp32."""
    masses = tl.zeros([BLOCKS], tl.float32)
    for block in range(num_blocks):
        x = _load_block(row_ptr, vocab_size, block, BLOCK)
        mass = tl.sum(_weigh_above(x, value, base, scale), axis=0)
        masses = tl.where(tl.arange(0, BLOCKS) == block, mass, masses)
    return masses


@triton.jit(do_not_specialize=["num_blocks"])
def _rejection_kernel(
    logits_ptr, row_stride, vocab_size, logit_rows_ptr, slots_ptr, chosen_ptr, random_ptr,
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, maximum_ptr, scaled_ptr, token_ptr, num_blocks,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    sample = tl.load(chosen_ptr + tl.program_id(0))
    slot = tl.load(slots_ptr + sample)
    top_k, top_p, min_p = tl.load(top_k_ptr + slot), tl.load(top_p_ptr + slot), tl.load(min_p_ptr + slot)
    row_ptr = logits_ptr + tl.load(logit_rows_ptr + sample).to(tl.int64) * row_stride
    scale = inverse_temperature(temperature_ptr, slot) * 1.4426950408889634
    blocks, inner = tl.arange(0, BLOCKS), tl.arange(0, BLOCK)
    at = sample.to(tl.int64) * num_blocks + blocks
    in_blocks = blocks < num_blocks
    maxima = tl.load(maximum_ptr + at, mask=in_blocks, other=float("-inf"))
    top = tl.max(maxima, axis=0)
    is_bad = (top == float("inf")) | (top == float("-inf"))
    base = tl.where(is_bad, 0.0, top)
    weight = tl.load(scaled_ptr + at, mask=in_blocks, other=0.0) * tl.exp2((maxima - base) * scale)
    weight = tl.where(in_blocks & (weight > 0), weight, 0.0)
    # A kept token has less mass above it than `limit`, and is not below `floor`.
    limit = top_p * tl.sum(weight, axis=0)
    floor = tl.where(min_p > 0, base + tl.log2(tl.maximum(min_p, 1e-30)) / scale, float("-inf"))
    floor = tl.minimum(floor, base)
    value, token, turn = float("-inf"), -1, 1
    is_looking = (_needs_limit(top_k, top_p, tl.load(seed_ptr + slot)) == 0) & (is_bad == 0)
    while is_looking:
        bits, _, _, _ = tl.philox(tl.load(random_ptr), sample, tl.load(random_ptr + 1).to(tl.int32), turn, 0)
        uniform = (bits >> 8).to(tl.float32) * (1.0 / 16777216.0)
        block, remaining = find_passing(weight, uniform * tl.sum(weight, axis=0), blocks, BLOCKS)
        x = _load_block(row_ptr, vocab_size, block, BLOCK)
        place, _ = find_passing(_weigh_above(x, value, base, scale), remaining, inner, BLOCK)
        token = block * BLOCK + place
        value = tl.max(tl.where(inner == place, x, float("-inf")), axis=0)
        mass = 0.0
        if value < top:
            mass = _sum_above(row_ptr, vocab_size, num_blocks, value, base, scale, BLOCK)
        is_looking = (mass >= limit) | (value < floor)
        if is_looking:
            weight = _sum_blocks_above(row_ptr, vocab_size, num_blocks, value, base, scale, BLOCK, BLOCKS)
            turn += 1
    tl.store(token_ptr + sample, token)


def sample_by_rejection(
    logits: torch.Tensor,
    samples: Samples,
    chosen: torch.Tensor,  # [f] int32: the samples with a filter
    state: DeviceSlots,
    work: Workspace,
    random: torch.Tensor,  # [2] int64, as for sample_tokens
) -> None:
    """Set work.token of the chosen samples that need no threshold. To be called after block_stats."""
    if chosen.shape[0]:
        _rejection_kernel[(chosen.shape[0],)](
            logits, logits.stride(0), logits.shape[1], samples.logit_rows, samples.slots, chosen, random,
            state["temperature"], state["top_k"], state["top_p"], state["min_p"], state["seed"], work.maximum,
            work.scaled_sum, work.token, work.num_blocks,
            BLOCK=work.block, BLOCKS=next_power_of_2(work.num_blocks), num_warps=16,
        )  # fmt: skip
