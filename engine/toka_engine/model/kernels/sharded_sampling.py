"""Samples a token where several ranks hold the logits of parts of the vocabulary: one small exchange a sample.

Each rank picks a token from its own part, as one GPU picks it from the whole, and stores a *candidate* into an inbox of
every rank: the part's maximum and masses, the token, its logit and its noisy score. All ranks then choose among the
candidates by the same rule and random number, so they choose the same token: the one of the largest maximum (greedy;
the lower rank on a tie), of a part that is drawn by its mass (exact, because the token was drawn from that part alone),
or of the best noisy score (seeded). Log-sum-exps are joined likewise.

The exchange is that of `all_reduce`: a word of an inbox is there when it differs from the mark, inboxes are used in
turn, and turns are counted on the device. What must hold for its programs and its marks holds here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from toka_engine.model.kernels import next_power_of_2
from toka_engine.model.kernels.all_reduce import EMPTY_WORD
from toka_engine.model.kernels.device_slots import DeviceSlots
from toka_engine.model.kernels.sampling import (
    MIN_TEMPERATURE,
    Samples,
    Workspace,
    find_base,
    find_passing,
    inverse_temperature,
    pick_noisy_token,
    pick_token,
)

CANDIDATE_WORDS = 8
"""int32 words of a candidate: maximum, mass at T, plain mass, token, its logit, its noisy score, check word, none."""
DISAGREES = -2
"""The id of a sample for which the ranks' check words differ."""
_NUM_TURNS, _NUM_WARPS = 2, 8
_EMPTY = tl.constexpr(EMPTY_WORD)
_WORDS = tl.constexpr(CANDIDATE_WORDS)
_TURNS = tl.constexpr(_NUM_TURNS)
_DISAGREES = tl.constexpr(DISAGREES)
_MIN_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)
_SAMPLE_BITS = tl.constexpr(13)
_CHECK_MASK = tl.constexpr((1 << 30) - 1)


@dataclass(frozen=True, slots=True)
class CandidateInboxes:
    """The inboxes of all ranks, and where this rank stands in them.

    An inbox region of a rank is int32 words [2 turns, max_samples, num_ranks (source), CANDIDATE_WORDS].
    """

    rank: int
    num_ranks: int
    max_samples: int
    addresses: torch.Tensor
    """[num_ranks] int64: the device address of each rank's region, as this rank's GPU sees it."""
    turns: torch.Tensor
    """[max_samples] int32, zero at first: how often each sample has been chosen."""
    disagreement: torch.Tensor
    """[3] int32, zero at first: whether check words have differed, this rank's, and the other one."""
    max_programs: int
    """Programs that this GPU runs at once, at most."""

    @staticmethod
    def size_bytes(max_samples: int, num_ranks: int) -> int:
        """Bytes of one rank's region."""
        return _NUM_TURNS * max_samples * num_ranks * CANDIDATE_WORDS * 4


@triton.jit
def _bits(value):
    """Return a float32 as int32 bits that are not the mark."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits == _EMPTY, _EMPTY + 1, bits)


@triton.jit
def _take_column(tile, columns, column: tl.constexpr):
    """Return a column of candidates [ROWS, words] as int32 [ROWS]."""
    return tl.sum(tl.where(columns == column, tile, 0), axis=1)


@triton.jit
def _take_floats(tile, columns, column: tl.constexpr):
    """Return a column of candidates [ROWS, words] as float32 [ROWS]."""
    return _take_column(tile, columns, column).to(tl.float32, bitcast=True)


@triton.jit
def _make_check(random_ptr, num_samples):
    """Return a word that is equal on all ranks while they sample the same step."""
    step = tl.load(random_ptr + 1).to(tl.int32)
    return ((step << _SAMPLE_BITS) + num_samples) & _CHECK_MASK


@triton.jit
def _find_candidate(
    logits_ptr, row_stride, width, first, logit_rows_ptr, slots_ptr, temperature_ptr, seed_ptr, random_ptr,
    maximum_ptr, scaled_ptr, plain_ptr, threshold_ptr, noisy_best_ptr, noisy_token_ptr, num_blocks, num_samples, sample,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, HAS_PLAIN: tl.constexpr, HAS_SEEDED: tl.constexpr,
):  # fmt: skip
    """Return this rank's candidate of a sample, as int32 words [CANDIDATE_WORDS]."""
    row_ptr = logits_ptr + tl.load(logit_rows_ptr + sample).to(tl.int64) * row_stride
    slot = tl.load(slots_ptr + sample)
    is_greedy = tl.load(temperature_ptr + slot) < _MIN_TEMPERATURE
    inv_t = inverse_temperature(temperature_ptr, slot)
    blocks = tl.arange(0, BLOCKS)
    in_blocks = blocks < num_blocks
    at = sample.to(tl.int64) * num_blocks + blocks
    maxima = tl.load(maximum_ptr + at, mask=in_blocks, other=float("-inf"))
    top, _, base = find_base(maxima)
    bits, _, _, _ = tl.philox(tl.load(random_ptr), sample, tl.load(random_ptr + 1).to(tl.int32), 0, 0)
    weight, token = pick_token(
        row_ptr, width, maxima, tl.load(scaled_ptr + at, mask=in_blocks, other=0.0), tl.load(threshold_ptr + sample),
        bits, is_greedy, inv_t, blocks, in_blocks, BLOCK, BLOCKS,
    )  # fmt: skip
    score = 0.0
    if HAS_SEEDED:
        is_seeded = (tl.load(seed_ptr + slot) >= 0) & (is_greedy == 0)
        score, noisy = pick_noisy_token(noisy_best_ptr, noisy_token_ptr, at, in_blocks, is_seeded, blocks, BLOCKS)
        token = tl.where(is_seeded, noisy, token)
    token = tl.minimum(token, width - 1)
    total, value = 0.0, 0.0
    if HAS_PLAIN:
        plain = tl.load(plain_ptr + at, mask=in_blocks, other=0.0) * tl.exp(maxima - base)
        total = tl.sum(tl.where(in_blocks & (plain > 0), plain, 0.0), axis=0)
        value = tl.load(row_ptr + token).to(tl.float32)
    column = tl.arange(0, _WORDS)
    words = tl.where(column == 0, _bits(top), 0)
    words = tl.where(column == 1, _bits(tl.sum(weight, axis=0)), words)
    words = tl.where(column == 3, first + token, words)
    words = tl.where(column == 6, _make_check(random_ptr, num_samples), words)
    if HAS_PLAIN:
        words = tl.where(column == 2, _bits(total), words)
        words = tl.where(column == 4, _bits(value), words)
    if HAS_SEEDED:
        words = tl.where(column == 5, _bits(score), words)
    return words


@triton.jit
def _find_inbox(addresses_ptr, owner, turn, sample, max_samples, num_ranks):
    """Return a pointer to the candidates [num_ranks, words] of a sample that `owner` is sent in this turn."""
    region = tl.load(addresses_ptr + owner).to(tl.pointer_type(tl.int32))
    return region + ((turn % _TURNS) * max_samples + sample) * (num_ranks * _WORDS)


@triton.jit
def _receive_candidates(inbox, num_ranks, ROWS: tl.constexpr):
    """Wait for the candidates of all ranks, return them as words [ROWS, words], and mark the inbox as empty."""
    # Each word is one thread's, so that all warps learn together that the last one is there. If every warp held all
    # words, the first to see them would mark the inbox as empty while another one still looks, and waits for ever.
    index = tl.arange(0, ROWS * _WORDS)
    is_sent = index < num_ranks * _WORDS
    word = tl.load(inbox + index, mask=is_sent, other=0, volatile=True)
    while tl.max((word == _EMPTY).to(tl.int32), axis=0) > 0:
        word = tl.load(inbox + index, mask=is_sent, other=0, volatile=True)
    tl.store(inbox + index, tl.full([ROWS * _WORDS], _EMPTY, tl.int32), mask=is_sent)
    return tl.reshape(word, [ROWS, _WORDS])


@triton.jit
def _choose(
    tile, slots_ptr, temperature_ptr, seed_ptr, num_sampled_ptr, last_token_ptr, random_ptr, disagreement_ptr, ids_ptr,
    logprobs_ptr, num_samples, sample, num_ranks,
    ROWS: tl.constexpr, HAS_PLAIN: tl.constexpr, HAS_SEEDED: tl.constexpr,
):  # fmt: skip
    """Choose among the candidates of a sample, and advance its slot."""
    slot = tl.load(slots_ptr + sample)
    is_greedy = tl.load(temperature_ptr + slot) < _MIN_TEMPERATURE
    inv_t = inverse_temperature(temperature_ptr, slot)
    ranks, columns = tl.arange(0, ROWS), tl.arange(0, _WORDS)[None, :]
    is_rank = ranks < num_ranks
    maxima = tl.where(is_rank, _take_floats(tile, columns, 0), float("-inf"))
    top, is_bad, base = find_base(maxima)
    mass = _take_floats(tile, columns, 1) * tl.exp((maxima - base) * inv_t)
    mass = tl.where(is_rank & (mass > 0), mass, 0.0)
    # The last argument parts these numbers from those that the ranks have drawn with.
    bits, _, _, _ = tl.philox(tl.load(random_ptr), sample, tl.load(random_ptr + 1).to(tl.int32), 0, 1)
    uniform = (bits >> 8).to(tl.float32) * (1.0 / 16777216.0)
    drawn, _ = find_passing(mass, uniform * tl.sum(mass, axis=0), ranks, ROWS)
    best = tl.min(tl.where((maxima == top) & is_rank, ranks, ROWS), axis=0)
    chosen = tl.where(is_greedy, best, drawn)
    if HAS_SEEDED:
        is_seeded = (tl.load(seed_ptr + slot) >= 0) & (is_greedy == 0)
        scores = tl.where(is_rank, _take_floats(tile, columns, 5), float("-inf"))
        winner = tl.min(tl.where(scores == tl.max(scores, axis=0), ranks, ROWS), axis=0)
        chosen = tl.where(is_seeded, winner, chosen)
    token = tl.sum(tl.where(ranks == chosen, _take_column(tile, columns, 3), 0), axis=0)
    if HAS_PLAIN:
        plain = _take_floats(tile, columns, 2) * tl.exp(maxima - base)
        total = tl.sum(tl.where(is_rank & (plain > 0), plain, 0.0), axis=0)
        value = tl.sum(tl.where(ranks == chosen, _take_floats(tile, columns, 4), 0.0), axis=0)
        logprob = value - base - tl.log(total)
        tl.store(logprobs_ptr + sample, tl.where(is_bad, float("nan"), logprob))
    check, checks = _make_check(random_ptr, num_samples), _take_column(tile, columns, 6)
    other = tl.max(tl.where(is_rank & (checks != check), checks, -1), axis=0)
    tl.store(disagreement_ptr, 1, mask=other >= 0)
    tl.store(disagreement_ptr + 1, check, mask=other >= 0)
    tl.store(disagreement_ptr + 2, other, mask=other >= 0)
    tl.store(ids_ptr + sample, tl.where(other >= 0, _DISAGREES, tl.where(is_bad, -1, token)))
    tl.store(last_token_ptr + slot, tl.where(is_bad, 0, token))
    tl.store(num_sampled_ptr + slot, tl.load(num_sampled_ptr + slot) + 1)


@triton.jit(do_not_specialize=["first", "num_blocks", "num_samples", "rank", "num_ranks", "max_samples"])
def _sharded_sample_kernel(
    logits_ptr, row_stride, width, first, logit_rows_ptr, slots_ptr,
    temperature_ptr, seed_ptr, num_sampled_ptr, last_token_ptr, random_ptr,
    maximum_ptr, scaled_ptr, plain_ptr, threshold_ptr, noisy_best_ptr, noisy_token_ptr,
    ids_ptr, logprobs_ptr, addresses_ptr, turns_ptr, disagreement_ptr, num_blocks, num_samples,
    rank, num_ranks, max_samples,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    HAS_PLAIN: tl.constexpr, HAS_SEEDED: tl.constexpr, SENDS: tl.constexpr, RECEIVES: tl.constexpr,
):  # fmt: skip
    step = tl.num_programs(0)
    sample = tl.program_id(0) - step
    while sample < num_samples:
        following = sample + step
        if SENDS and following < num_samples:
            words = _find_candidate(
                logits_ptr, row_stride, width, first, logit_rows_ptr, slots_ptr, temperature_ptr, seed_ptr, random_ptr,
                maximum_ptr, scaled_ptr, plain_ptr, threshold_ptr, noisy_best_ptr, noisy_token_ptr, num_blocks,
                num_samples, following, BLOCK, BLOCKS, HAS_PLAIN, HAS_SEEDED,
            )  # fmt: skip
            turn = tl.load(turns_ptr + following).to(tl.int64)
            for owner in range(num_ranks):
                inbox = _find_inbox(addresses_ptr, owner, turn, following, max_samples, num_ranks)
                tl.store(inbox + rank * _WORDS + tl.arange(0, _WORDS), words)
        if RECEIVES and sample >= 0:
            turn = tl.load(turns_ptr + sample).to(tl.int64)
            inbox = _find_inbox(addresses_ptr, rank, turn, sample, max_samples, num_ranks)
            tile = _receive_candidates(inbox, num_ranks, ROWS)
            tl.store(turns_ptr + sample, (turn + 1).to(tl.int32))
            _choose(
                tile, slots_ptr, temperature_ptr, seed_ptr, num_sampled_ptr, last_token_ptr, random_ptr,
                disagreement_ptr, ids_ptr, logprobs_ptr, num_samples, sample, num_ranks, ROWS, HAS_PLAIN, HAS_SEEDED,
            )  # fmt: skip
        sample = following


def sample_sharded(
    logits: torch.Tensor,  # [rows, width]: this rank's part of the vocabulary
    first: int,  # the token of the first logit
    samples: Samples,
    state: DeviceSlots,
    work: Workspace,
    random: torch.Tensor,  # [2] int64, equal on all ranks: engine seed, step number
    ids: torch.Tensor,  # [n] int32
    logprobs: torch.Tensor | None,  # [n] fp32
    with_seeded: bool,
    inboxes: CandidateInboxes,
    *,
    sends: bool = True,
    receives: bool = True,
) -> None:
    """Sample every entry as `sampling.sample_tokens` does, over the vocabulary of all ranks.

    Entries have no filter. Every rank must launch it with as many samples, in the same order of launches. A caller that
    simulates several ranks on one device launches the `sends` of all before the `receives` of any.
    """
    count = len(samples)
    if count > inboxes.max_samples:
        raise AssertionError(f"{count} samples are more than the inboxes are for")
    if count:
        _sharded_sample_kernel[(min(count, inboxes.max_programs),)](
            logits, logits.stride(0), logits.shape[1], first, samples.logit_rows, samples.slots,
            state["temperature"], state["seed"], state["num_sampled"], state.last_token, random,
            work.maximum, work.scaled_sum, work.plain_sum, work.threshold, work.noisy_best, work.noisy_token,
            ids, work.maximum if logprobs is None else logprobs, inboxes.addresses, inboxes.turns,
            inboxes.disagreement, work.num_blocks, count, inboxes.rank, inboxes.num_ranks,
            inboxes.max_samples, ROWS=32 * _NUM_WARPS // CANDIDATE_WORDS,
            BLOCK=work.block, BLOCKS=next_power_of_2(work.num_blocks),
            HAS_PLAIN=logprobs is not None, HAS_SEEDED=with_seeded, SENDS=sends, RECEIVES=receives,
            num_warps=_NUM_WARPS,
        )  # fmt: skip
