"""Seeded sampling by the Gumbel-max trick: argmax of x / T plus noise that is a hash of (seed, output index, token).

The noise does not depend on the batch, so the same request gives the same text whatever else runs, as far as the logits
agree: a small difference in them rarely changes the argmax.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from toka_engine.model.kernels.device_slots import DeviceSlots
from toka_engine.model.kernels.sampling import Samples, Workspace, inverse_temperature


@triton.jit
def _noise(seed, output_index, first_token, BLOCK: tl.constexpr):
    """Return standard Gumbel noise of the tokens from `first_token` on: a word of Philox each, four from one hash."""
    group = first_token // 4 + tl.arange(0, BLOCK // 4)
    first, second, third, fourth = tl.philox(seed, group, output_index, 0, 0, 7)
    bits = tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), [BLOCK])
    # v in (0, 1), as fine near 0 as fp32 allows: the largest noise comes from the smallest -log(1 - v).
    v = bits.to(tl.float32) * (1.0 / 4294967296.0) + (1.0 / 8589934592.0)
    exponential = tl.where(v < 0.01, v + v * v * 0.5 + v * v * v * (1.0 / 3.0), -tl.log(1.0 - v))
    return -tl.log(exponential)


@triton.jit(do_not_specialize=["first"])
def _noisy_best_kernel(
    logits_ptr, row_stride, vocab_size, first, logit_rows_ptr, slots_ptr, chosen_ptr,
    temperature_ptr, seed_ptr, num_sampled_ptr, maximum_ptr, threshold_ptr, best_ptr, token_ptr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.load(chosen_ptr + tl.program_id(0))
    block = tl.program_id(1)
    at = sample.to(tl.int64) * tl.num_programs(1) + block
    threshold = tl.load(threshold_ptr + sample)
    best, token = float("-inf"), vocab_size - 1
    if tl.load(maximum_ptr + at) >= threshold:  # most blocks of a filtered sample keep nothing
        row_ptr = logits_ptr + tl.load(logit_rows_ptr + sample).to(tl.int64) * row_stride
        slot = tl.load(slots_ptr + sample)
        index = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + index, mask=index < vocab_size, other=float("-inf")).to(tl.float32)
        noise = _noise(tl.load(seed_ptr + slot), tl.load(num_sampled_ptr + slot), first + block * BLOCK, BLOCK)
        score = x * inverse_temperature(temperature_ptr, slot) + noise
        score = tl.where((x >= threshold) & (index < vocab_size), score, float("-inf"))
        best = tl.max(score, axis=0)
        token = tl.min(tl.where(score == best, index, vocab_size - 1), axis=0)
    tl.store(best_ptr + at, best)
    tl.store(token_ptr + at, token)


def add_noise(
    logits: torch.Tensor,
    samples: Samples,
    chosen: torch.Tensor,  # [g] int32: the samples with a seed
    state: DeviceSlots,
    work: Workspace,
    first: int = 0,
) -> None:
    """Find the best noisy token of each block, for the chosen samples. To be called after apply_filters.

    `first`: the token of the first logit, a multiple of 4, where a rank has a part of the vocabulary.
    """
    if chosen.shape[0]:
        _noisy_best_kernel[(chosen.shape[0], work.num_blocks)](
            logits, logits.stride(0), logits.shape[1], first, samples.logit_rows, samples.slots, chosen,
            state["temperature"], state["seed"], state["num_sampled"], work.maximum, work.threshold, work.noisy_best,
            work.noisy_token, BLOCK=work.block, num_warps=8,
        )  # fmt: skip
