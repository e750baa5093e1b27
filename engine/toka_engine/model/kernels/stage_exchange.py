"""Rows and tokens on their way between pipeline stages on GPUs: stores into the memory of another stage's GPU.

A stage stores the rows of a step into a place in the memory of the stage behind it, then raises that stage's flag to
the number of steps that it has handed over; there are several places, used in turn. The stage behind copies the rows
out and gives the place back as it begins its next step. The last stage stores what it has sampled where the first one
looks last tokens up, then raises the first one's flag to the number of the step.

All stages execute the same steps in the same order, so one count of steps on each device says which place is meant, and
CUDA graphs, whose addresses are fixed, find theirs. Flags only rise, and what a step waits for is sent by steps before
it, or by stages before this one: nothing waits for itself. One program of one warp waits, before anything else of the
step; the rest of the GPU is free. It waits as long as it takes: who has died or stopped is the supervisor's business.

Until a stage is opened its kernels neither wait nor send, so that stages may warm up and capture at their own pace.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from toka_engine.model.kernels import cdiv

FLAG_WORDS = 96
"""int32 words of a stage's flags, zero at first. Each flag has 128 bytes of its own."""
ROWS_FLAG, PLACES_FLAG, TOKENS_FLAG = 0, 32, 64
_ROWS_FLAG, _PLACES_FLAG, _TOKENS_FLAG = tl.constexpr(ROWS_FLAG), tl.constexpr(PLACES_FLAG), tl.constexpr(TOKENS_FLAG)
_COUNT, _NUMBER = tl.constexpr(1), tl.constexpr(2)
"""Words of the state: whether the stage is open, the steps that have begun since, and the number of the last one."""
_PREVIOUS_FLAGS, _NEXT_FLAGS = tl.constexpr(0), tl.constexpr(1)
_NEXT_PLACES, _FIRST_FLAGS, _FIRST_TOKENS = tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
_COPY_BLOCK, _TOKEN_BLOCK = 2048, 128


@dataclass(frozen=True, slots=True)
class StagePorts:
    """One stage's end of the exchange, and where the others' are."""

    is_first: bool
    is_last: bool
    has_rows: bool
    """Whether this rank hands rows over; of tensor parallel ranks one does, the others raise their flags alone."""
    num_places: int
    max_rows: int
    width: int
    state: torch.Tensor
    """[3] int64, zero at first."""
    flags: torch.Tensor
    """[FLAG_WORDS] int32: this rank's."""
    places: torch.Tensor | None
    """This rank's, bfloat16, `place_words` int32 words each, if the stage before hands it rows."""
    addresses: torch.Tensor
    """[5] int64: flags of the stage before and of the one behind, its places; the first one's flags and tokens."""
    place_words: int
    """int32 words from one place to the next, a multiple of 16."""


@triton.jit
def _wait(flag_ptr, target):
    # By the difference, so that a count that has gone round is no lower one.
    seen = tl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys")
    while seen - target < 0:
        seen = tl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys")


@triton.jit(do_not_specialize=["number", "after", "num_places"])
def _begin_kernel(
    state_ptr, flags_ptr, addresses_ptr, number, after, num_places, IS_FIRST: tl.constexpr, IS_LAST: tl.constexpr
):  # fmt: skip
    if tl.load(state_ptr) != 0:
        count = tl.load(state_ptr + _COUNT) + 1
        tl.store(state_ptr + _COUNT, count)
        tl.store(state_ptr + _NUMBER, number.to(tl.int64))
        turn = count.to(tl.int32)
        if not IS_FIRST:
            previous = tl.load(addresses_ptr + _PREVIOUS_FLAGS).to(tl.pointer_type(tl.int32))
            tl.atomic_xchg(previous + _PLACES_FLAG, turn - 1, sem="release", scope="sys")
            _wait(flags_ptr + _ROWS_FLAG, turn)
        if not IS_LAST:
            _wait(flags_ptr + _PLACES_FLAG, turn - num_places)
        if IS_FIRST:
            _wait(flags_ptr + _TOKENS_FLAG, after)


@triton.jit(do_not_specialize=["num_rows", "num_places"])
def _take_rows_kernel(
    state_ptr, places_ptr, out_ptr, num_rows, row_words, place_words, num_places, BLOCK: tl.constexpr
):  # fmt: skip
    num_words = num_rows * row_words
    place = tl.load(state_ptr + _COUNT) % num_places
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.load(places_ptr + place * place_words + word, mask=word < num_words, other=0)
    tl.store(out_ptr + word, rows, mask=word < num_words)


@triton.jit(do_not_specialize=["num_rows", "num_places"])
def _put_rows_kernel(
    state_ptr, addresses_ptr, rows_ptr, num_rows, row_words, place_words, num_places, BLOCK: tl.constexpr
):  # fmt: skip
    num_words = num_rows * row_words
    if tl.load(state_ptr) != 0:
        place = tl.load(state_ptr + _COUNT) % num_places
        places = tl.multiple_of(tl.load(addresses_ptr + _NEXT_PLACES).to(tl.pointer_type(tl.int32)), 16)
        word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        rows = tl.load(rows_ptr + word, mask=word < num_words, other=0)
        tl.store(places + place * place_words + word, rows, mask=word < num_words)


@triton.jit
def _raise_rows_kernel(state_ptr, addresses_ptr):
    if tl.load(state_ptr) != 0:
        following = tl.load(addresses_ptr + _NEXT_FLAGS).to(tl.pointer_type(tl.int32))
        turn = tl.load(state_ptr + _COUNT).to(tl.int32)
        tl.atomic_xchg(following + _ROWS_FLAG, turn, sem="release", scope="sys")


@triton.jit(do_not_specialize=["count"])
def _send_tokens_kernel(state_ptr, addresses_ptr, slots_ptr, last_token_ptr, count, BLOCK: tl.constexpr):
    if tl.load(state_ptr) != 0:
        tokens = tl.load(addresses_ptr + _FIRST_TOKENS).to(tl.pointer_type(tl.int32))
        row = tl.arange(0, BLOCK)
        for start in range(0, count, BLOCK):
            inside = start + row < count
            slot = tl.load(slots_ptr + start + row, mask=inside, other=0)
            tl.store(tokens + slot, tl.load(last_token_ptr + slot, mask=inside, other=0), mask=inside)
        tl.debug_barrier()  # the flag is raised behind the tokens of all threads
        first = tl.load(addresses_ptr + _FIRST_FLAGS).to(tl.pointer_type(tl.int32))
        number = tl.load(state_ptr + _NUMBER).to(tl.int32)
        tl.atomic_xchg(first + _TOKENS_FLAG, number, sem="release", scope="sys")


def begin_step(ports: StagePorts, number: int, after: int) -> None:
    """Begin step `number`: wait for its rows, or for the tokens of step `after`, and for a place to put rows in."""
    _begin_kernel[(1,)](
        ports.state, ports.flags, ports.addresses, _wrap(number), _wrap(after), ports.num_places,
        IS_FIRST=ports.is_first, IS_LAST=ports.is_last, num_warps=1,
    )  # fmt: skip


def take_rows(ports: StagePorts, num_rows: int) -> torch.Tensor:
    """Return the rows [num_rows, width] of the step that has begun, as new memory. More than were sent: any rows."""
    device = ports.state.device
    if ports.places is None:
        return torch.zeros((num_rows, ports.width), dtype=torch.bfloat16, device=device)
    rows = torch.empty((num_rows, ports.width), dtype=torch.bfloat16, device=device)
    row_words = ports.width // 2
    if num_rows:
        _take_rows_kernel[(cdiv(num_rows * row_words, _COPY_BLOCK),)](
            ports.state, ports.places.view(torch.int32), rows.view(torch.int32), num_rows, row_words,
            ports.place_words, ports.num_places, BLOCK=_COPY_BLOCK, num_warps=8,
        )  # fmt: skip
    return rows


def put_rows(ports: StagePorts, rows: torch.Tensor) -> None:
    """Hand the rows [n, width] of the step that has begun to the stage behind."""
    if rows.shape[0] > ports.max_rows or rows.shape[1] != ports.width or rows.dtype != torch.bfloat16:
        raise AssertionError(f"rows of {tuple(rows.shape)} {rows.dtype} are not what the places are for")
    num_rows, row_words = rows.shape[0], ports.width // 2
    if ports.has_rows and num_rows:
        _put_rows_kernel[(cdiv(num_rows * row_words, _COPY_BLOCK),)](
            ports.state, ports.addresses, rows.view(torch.int32), num_rows, row_words,
            ports.place_words, ports.num_places, BLOCK=_COPY_BLOCK, num_warps=8,
        )  # fmt: skip
    _raise_rows_kernel[(1,)](ports.state, ports.addresses, num_warps=1)


def send_tokens(ports: StagePorts, slots: torch.Tensor, last_token: torch.Tensor) -> None:
    """Give the first stage `last_token` [all slots] int32 of `slots` [n] int32, which this step has sampled for."""
    _send_tokens_kernel[(1,)](
        ports.state, ports.addresses, slots, last_token, slots.shape[0], BLOCK=_TOKEN_BLOCK,
        num_warps=_TOKEN_BLOCK // 32,
    )  # fmt: skip


def _wrap(number: int) -> int:
    """Return a step's number as 32 bits have it."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)
