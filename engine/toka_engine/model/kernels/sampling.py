"""The sampler's two kernels for every row: block statistics, then the choice of a token.

`block_stats` reads the logits once: per sample and block of the vocabulary it stores the maximum and the sum of
exp((x - max) / T). `sample_tokens` picks a block from those sums by one uniform number, then the token inside it, so
that it reads one block per sample. Greedy is the maximum; the log-sum-exp for logprobs comes from the same pass.
Samples with a seed use Gumbel noise (`seeded_sampling`); samples with top_k, top_p or min_p use rejection or a
threshold (`top_p_rejection`, `top_k_gathering`, `filtering`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from toka_engine.model.kernels import cdiv, next_power_of_2
from toka_engine.model.kernels.device_slots import DeviceSlots

BLOCK = 4096
"""Logits per program, 16 KiB of fp32."""

MIN_TEMPERATURE = 1e-5
"""Temperatures below this are greedy."""
_MIN_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)


@dataclass(frozen=True, slots=True)
class Samples:
    """n samples: the row of the logits and the slot of each, [n] int32."""

    logit_rows: torch.Tensor
    slots: torch.Tensor

    def __len__(self) -> int:
        return self.slots.shape[0]


@dataclass(frozen=True, slots=True)
class Workspace:
    """Scratch of the sampler for up to `max_samples` samples; allocated once, so that graphs may hold it."""

    block: int
    num_blocks: int
    maximum: torch.Tensor  # [n, num_blocks] fp32; +inf: a logit of the block is NaN or +inf
    scaled_sum: torch.Tensor  # [n, num_blocks] fp32: sum of exp((x - maximum) / T), above the threshold if any
    plain_sum: torch.Tensor  # [n, num_blocks] fp32: sum of exp(x - maximum)
    threshold: torch.Tensor  # [n] fp32: tokens below are not sampled; -inf: all are
    token: torch.Tensor  # [n] int32: token sampled already (rejection); -1: none
    gathered: torch.Tensor  # [n, room] fp32: the best logits of samples with top_k, in any order
    num_gathered: torch.Tensor  # [n] int32: how many there are, or would be with more room
    noisy_best: torch.Tensor  # [n, num_blocks] fp32: best x / T plus noise of seeded samples
    noisy_token: torch.Tensor  # [n, num_blocks] int32

    @classmethod
    def allocate(
        cls, max_samples: int, vocab_size: int, device: torch.device, block: int = BLOCK, room: int = 1024
    ) -> Workspace:
        num_blocks = cdiv(vocab_size, block)

        def blocks(dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros((max_samples, num_blocks), dtype=dtype, device=device)

        def vector(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(max_samples, dtype=dtype, device=device)

        return cls(
            block, num_blocks, blocks(), blocks(), blocks(), vector(torch.float32), vector(torch.int32),
            torch.zeros((max_samples, room), dtype=torch.float32, device=device), vector(torch.int32), blocks(),
            blocks(torch.int32),
        )  # fmt: skip


@triton.jit
def inverse_temperature(temperature_ptr, slot):
    """Return 1 / T of a slot; 1 for greedy ones, whose sums nobody reads."""
    temperature = tl.load(temperature_ptr + slot)
    return tl.where(temperature < _MIN_TEMPERATURE, 1.0, 1.0 / tl.maximum(temperature, _MIN_TEMPERATURE))


@triton.jit
def _block_stats_kernel(
    logits_ptr, row_stride, vocab_size, logit_rows_ptr, slots_ptr, temperature_ptr,
    maximum_ptr, scaled_ptr, plain_ptr, threshold_ptr, token_ptr, num_gathered_ptr,
    BLOCK: tl.constexpr, HAS_PLAIN: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs read neighbouring blocks.
    block = tl.program_id(0)
    sample = tl.program_id(1)
    row = tl.load(logit_rows_ptr + sample).to(tl.int64)
    inv_t = inverse_temperature(temperature_ptr, tl.load(slots_ptr + sample))
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < vocab_size
    x = tl.load(logits_ptr + row * row_stride + index, mask=inside, other=float("-inf")).to(tl.float32)
    maximum = tl.max(x, axis=0)
    base = tl.where((maximum == float("-inf")) | (maximum == float("inf")), 0.0, maximum)
    at = sample.to(tl.int64) * tl.num_programs(0) + block
    scaled = tl.sum(tl.exp2((x - base) * (inv_t * 1.4426950408889634)), axis=0)
    tl.store(scaled_ptr + at, scaled)
    if HAS_PLAIN:
        tl.store(plain_ptr + at, tl.sum(tl.exp(x - base), axis=0))
    # A NaN or +inf among the logits shows in the sum, whatever the maximum made of it.
    is_bad = (scaled != scaled) | (scaled == float("inf"))
    tl.store(maximum_ptr + at, tl.where(is_bad, float("inf"), maximum))
    tl.store(threshold_ptr + sample, float("-inf"), mask=block == 0)
    tl.store(token_ptr + sample, -1, mask=block == 0)
    tl.store(num_gathered_ptr + sample, 0, mask=block == 0)


@triton.jit
def find_passing(weight, target, indices, SIZE: tl.constexpr):
    """Return the first index at which the running sum of `weight` [SIZE] passes `target`, and the rest of `target`.

    `indices` is arange(SIZE); scalars are fp32.
    """
    hit = tl.min(tl.where((tl.cumsum(weight, axis=0) > target) & (weight > 0), indices, SIZE), axis=0)
    index = tl.minimum(hit, tl.max(tl.where(weight > 0, indices, 0), axis=0))
    return index, target - tl.sum(tl.where(indices < index, weight, 0.0), axis=0)


@triton.jit
def find_base(maxima):
    """Return the maximum of a sample's block maxima, whether its logits are not finite, and what exp subtracts."""
    top = tl.max(maxima, axis=0)
    is_bad = (top == float("inf")) | (top == float("-inf"))
    return top, is_bad, tl.where(is_bad, 0.0, top)


@triton.jit
def pick_token(
    row_ptr, vocab_size, maxima, scaled, threshold, bits, is_greedy, inv_t, blocks, in_blocks,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Return the blocks' masses [BLOCKS] and the token of a row: drawn by the random `bits`, or the first maximum."""
    top, is_bad, base = find_base(maxima)
    # The block: by the running sum of the blocks' masses, or the first one that holds the maximum.
    weight = scaled * tl.exp((maxima - base) * inv_t)
    weight = tl.where(in_blocks & (weight > 0), weight, 0.0)
    uniform = (bits >> 8).to(tl.float32) * (1.0 / 16777216.0)
    drawn_block, remaining = find_passing(weight, uniform * tl.sum(weight, axis=0), blocks, BLOCKS)
    first_best = tl.min(tl.where((maxima == top) & in_blocks, blocks, BLOCKS), axis=0)
    block = tl.where(is_greedy, first_best, drawn_block)
    block = tl.where(is_bad, 0, block)

    # The token inside the block.
    inner = tl.arange(0, BLOCK)
    index = block * BLOCK + inner
    x = tl.load(row_ptr + index, mask=index < vocab_size, other=float("-inf")).to(tl.float32)
    mass = tl.where(x >= threshold, tl.exp((x - base) * inv_t), 0.0)
    drawn, _ = find_passing(mass, remaining, inner, BLOCK)
    best = tl.min(tl.where(x == top, inner, BLOCK - 1), axis=0)
    return weight, block * BLOCK + tl.where(is_greedy, best, drawn)


@triton.jit
def pick_noisy_token(noisy_best_ptr, noisy_token_ptr, at, in_blocks, is_seeded, blocks, BLOCKS: tl.constexpr):
    """Return the best noisy score of a sample's blocks, and its token."""
    scores = tl.load(noisy_best_ptr + at, mask=in_blocks & is_seeded, other=float("-inf"))
    tokens = tl.load(noisy_token_ptr + at, mask=in_blocks & is_seeded, other=0)
    best = tl.max(scores, axis=0)
    winner = tl.min(tl.where(scores == best, blocks, BLOCKS), axis=0)
    return best, tl.sum(tl.where(blocks == winner, tokens, 0), axis=0)


@triton.jit(do_not_specialize=["num_blocks"])
def _sample_kernel(
    logits_ptr, row_stride, vocab_size, logit_rows_ptr, slots_ptr,
    temperature_ptr, seed_ptr, num_sampled_ptr, last_token_ptr, random_ptr,
    maximum_ptr, scaled_ptr, plain_ptr, threshold_ptr, sampled_ptr, noisy_best_ptr, noisy_token_ptr,
    ids_ptr, logprobs_ptr, num_blocks,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, HAS_PLAIN: tl.constexpr, HAS_SEEDED: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0)
    row = tl.load(logit_rows_ptr + sample).to(tl.int64)
    slot = tl.load(slots_ptr + sample)
    is_greedy = tl.load(temperature_ptr + slot) < _MIN_TEMPERATURE
    inv_t = inverse_temperature(temperature_ptr, slot)
    blocks = tl.arange(0, BLOCKS)
    in_blocks = blocks < num_blocks
    at = sample.to(tl.int64) * num_blocks + blocks
    maxima = tl.load(maximum_ptr + at, mask=in_blocks, other=float("-inf"))
    _, is_bad, base = find_base(maxima)
    bits, _, _, _ = tl.philox(tl.load(random_ptr), sample, tl.load(random_ptr + 1).to(tl.int32), 0, 0)
    _, token = pick_token(
        logits_ptr + row * row_stride, vocab_size, maxima, tl.load(scaled_ptr + at, mask=in_blocks, other=0.0),
        tl.load(threshold_ptr + sample), bits, is_greedy, inv_t, blocks, in_blocks, BLOCK, BLOCKS,
    )  # fmt: skip
    before = tl.load(sampled_ptr + sample)
    token = tl.where(before >= 0, before, token)
    if HAS_SEEDED:
        is_seeded = (tl.load(seed_ptr + slot) >= 0) & (is_greedy == 0)
        _, noisy = pick_noisy_token(noisy_best_ptr, noisy_token_ptr, at, in_blocks, is_seeded, blocks, BLOCKS)
        token = tl.where(is_seeded, noisy, token)
    token = tl.minimum(token, vocab_size - 1)
    if HAS_PLAIN:
        plain = tl.load(plain_ptr + at, mask=in_blocks, other=0.0) * tl.exp(maxima - base)
        total = tl.sum(tl.where(in_blocks & (plain > 0), plain, 0.0), axis=0)
        value = tl.load(logits_ptr + row * row_stride + token).to(tl.float32)
        logprob = value - base - tl.log(total)
        tl.store(logprobs_ptr + sample, tl.where(is_bad, float("nan"), logprob))
    tl.store(ids_ptr + sample, tl.where(is_bad, -1, token))
    tl.store(last_token_ptr + slot, tl.where(is_bad, 0, token))
    tl.store(num_sampled_ptr + slot, tl.load(num_sampled_ptr + slot) + 1)


def block_stats(
    logits: torch.Tensor, samples: Samples, state: DeviceSlots, work: Workspace, with_logprobs: bool
) -> None:
    """Pass once over logits [rows, vocab_size]: fill work.maximum, scaled_sum, threshold and, if asked, plain_sum."""
    if len(samples):
        _block_stats_kernel[(work.num_blocks, len(samples))](
            logits, logits.stride(0), logits.shape[1], samples.logit_rows, samples.slots, state["temperature"],
            work.maximum, work.scaled_sum, work.plain_sum, work.threshold, work.token,
            work.num_gathered, BLOCK=work.block, HAS_PLAIN=with_logprobs, num_warps=8,
        )  # fmt: skip


def sample_tokens(
    logits: torch.Tensor,
    samples: Samples,
    state: DeviceSlots,
    work: Workspace,
    random: torch.Tensor,  # [2] int64: engine seed, step number (Philox: key and counter)
    ids: torch.Tensor,  # [n] int32
    logprobs: torch.Tensor | None,  # [n] fp32
    with_seeded: bool,
) -> None:
    """Sample every entry: fill ids (-1: not finite) and logprobs (NaN there), and advance the slots' state.

    Logprobs need block_stats with_logprobs.
    """
    if len(samples):
        _sample_kernel[(len(samples),)](
            logits, logits.stride(0), logits.shape[1], samples.logit_rows, samples.slots,
            state["temperature"], state["seed"], state["num_sampled"], state.last_token, random,
            work.maximum, work.scaled_sum, work.plain_sum, work.threshold, work.token, work.noisy_best,
            work.noisy_token, ids, work.maximum if logprobs is None else logprobs, work.num_blocks,
            BLOCK=work.block, BLOCKS=next_power_of_2(work.num_blocks),
            HAS_PLAIN=logprobs is not None, HAS_SEEDED=with_seeded, num_warps=8,
        )  # fmt: skip
