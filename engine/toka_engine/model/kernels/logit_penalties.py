"""Presence, frequency and repetition penalties: changed logits in fp32, for the rows that ask only.

One kernel counts each row's tokens, which are stored with its keys and values in the pages; another applies the
penalties. `cpu.penalties` has their definition.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from toka_engine.model.kernels import cdiv
from toka_engine.model.kernels.sampling import BLOCK

_IN_PROMPT = tl.constexpr(1 << 30)
"""Bit that marks a prompt token in its count; the lower bits say how often it was generated."""
_TOKENS_PER_PROGRAM = 1024


@dataclass(frozen=True, slots=True)
class PenaltyInputs:
    """Inputs from the host for m rows; [m] each."""

    logit_rows: torch.Tensor  # int32
    sources: torch.Tensor  # int32: slot whose pages hold the row's tokens
    lengths: torch.Tensor  # int32
    num_generated: torch.Tensor  # int32
    presence: torch.Tensor  # fp32
    frequency: torch.Tensor  # fp32
    repetition: torch.Tensor  # fp32


@dataclass(frozen=True, slots=True)
class PenaltyWorkspace:
    """Scratch for up to `num_rows` rows at a time, allocated once."""

    num_rows: int
    logits: torch.Tensor  # [num_rows, vocab] fp32
    counts: torch.Tensor  # [num_rows, vocab] int32; all zero between uses

    @classmethod
    def allocate(cls, num_rows: int, vocab_size: int, device: torch.device) -> PenaltyWorkspace:
        shape = (num_rows, vocab_size)
        return cls(
            num_rows,
            torch.zeros(shape, dtype=torch.float32, device=device),
            torch.zeros(shape, dtype=torch.int32, device=device),
        )


@triton.jit(do_not_specialize=["columns"])
def _count_tokens_kernel(
    counts_ptr, vocab_size, sources_ptr, lengths_ptr, num_generated_ptr, table_ptr, columns, page_tokens_ptr,
    PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    length = tl.load(lengths_ptr + row)
    inside = position < length
    source = tl.load(sources_ptr + row).to(tl.int64)
    page = tl.load(table_ptr + source * columns + position // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
    token = tl.load(page_tokens_ptr + page * PAGE_SIZE + position % PAGE_SIZE, mask=inside, other=0)
    is_generated = position >= length - tl.load(num_generated_ptr + row)
    at = counts_ptr + row * vocab_size + token
    tl.atomic_add(at, 1, mask=inside & is_generated, sem="relaxed")
    tl.atomic_or(at, _IN_PROMPT, mask=inside & (is_generated == 0), sem="relaxed")


@triton.jit
def _apply_penalties_kernel(
    logits_ptr, row_stride, vocab_size, logit_rows_ptr, presence_ptr, frequency_ptr, repetition_ptr,
    counts_ptr, out_ptr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    logit_row = tl.load(logit_rows_ptr + row).to(tl.int64)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < vocab_size
    x = tl.load(logits_ptr + logit_row * row_stride + index, mask=inside, other=0.0).to(tl.float32)
    at = row * vocab_size + index
    count = tl.load(counts_ptr + at, mask=inside, other=0)
    tl.store(counts_ptr + at, tl.zeros([BLOCK], tl.int32), mask=inside & (count != 0))  # for the next use
    repetition = tl.load(repetition_ptr + row)
    num_generated = (count & (_IN_PROMPT - 1)).to(tl.float32)
    x = tl.where(count != 0, tl.where(x > 0, x / repetition, x * repetition), x)
    x -= tl.load(frequency_ptr + row) * num_generated
    x -= tl.where(num_generated > 0, tl.load(presence_ptr + row), 0.0)
    tl.store(out_ptr + at, x, mask=inside)


def apply_penalties(
    logits: torch.Tensor,  # [rows, vocab]
    inputs: PenaltyInputs,  # m rows, at most work.num_rows
    max_length: int,
    block_table: torch.Tensor,  # [max_seqs, columns] int32
    page_tokens: torch.Tensor,  # [pages, page_size] int32
    work: PenaltyWorkspace,
) -> torch.Tensor:
    """Return changed logits [m, vocab] fp32 of `inputs.logit_rows`, a buffer that the next call overwrites.

    `logits` may be that buffer, with its rows in order.
    """
    count, vocab_size = inputs.sources.shape[0], logits.shape[1]
    if max_length:
        _count_tokens_kernel[(count, cdiv(max_length, _TOKENS_PER_PROGRAM))](
            work.counts, vocab_size, inputs.sources, inputs.lengths, inputs.num_generated,
            block_table, block_table.shape[1], page_tokens,
            PAGE_SIZE=page_tokens.shape[1], BLOCK=_TOKENS_PER_PROGRAM, num_warps=4,
        )  # fmt: skip
    _apply_penalties_kernel[(cdiv(vocab_size, BLOCK), count)](
        logits, logits.stride(0), vocab_size, inputs.logit_rows, inputs.presence, inputs.frequency, inputs.repetition,
        work.counts, work.logits, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return work.logits[:count]
