"""Masks of allowed tokens: logits of tokens that a row's grammar does not allow become -inf, in place.

A row reads one bit per token and writes only what it bars, so that a mask costs less than reading the row's logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from toka_engine.model.kernels import cdiv

_BLOCK = 4096
"""Tokens per program."""


@triton.jit(do_not_specialize=["row_stride", "vocab_size", "num_words"])
def _mask_kernel(
    logits_ptr, row_stride, vocab_size, logit_rows_ptr, samples_ptr, words_ptr, num_words,
    BLOCK: tl.constexpr,
):  # fmt: skip
    mask = tl.program_id(1)
    sample = tl.load(samples_ptr + mask)
    if sample >= 0:
        row = tl.load(logit_rows_ptr + sample).to(tl.int64)
        token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = token < vocab_size
        word = tl.load(words_ptr + mask.to(tl.int64) * num_words + token // 32, mask=inside, other=-1)
        is_barred = ((word >> (token % 32)) & 1) == 0
        barred = tl.full([BLOCK], float("-inf"), tl.float32)
        tl.store(logits_ptr + row * row_stride + token, barred, mask=inside & is_barred)


def apply_masks(
    logits: torch.Tensor,  # [rows, vocab] fp32, changed in place
    logit_rows: torch.Tensor,  # [n] int32: row of logits of each sample
    samples: torch.Tensor,  # [k] int32: the sample of each mask; -1: none
    words: torch.Tensor,  # [k, num_words] int32: bit i of word w allows token 32 * w + i
) -> None:
    """Bar the tokens whose bit is 0. Samples that share a row of logits must have equal masks."""
    if samples.shape[0]:
        _mask_kernel[(cdiv(logits.shape[1], _BLOCK), samples.shape[0])](
            logits, logits.stride(0), logits.shape[1], logit_rows, samples, words, words.shape[1],
            BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
