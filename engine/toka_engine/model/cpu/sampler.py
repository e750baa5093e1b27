"""Samples tokens on a CPU: greedy, temperature, exact top_k, top_p and min_p, seeds, penalties, grammars, logprobs.
Only rows that ask pay.

Unseeded rows: one pass makes exp((x - max) / T) and its sums over blocks of the vocabulary; a uniform number picks the
block, then the token in it (inverse transform, exact). Seeded rows: Gumbel-max (Gumbel 1954; Maddison et al. 2014) with
noise by hash(seed, position, token), so that a sample depends on nothing else, and small differences of the logits
rarely change it. Filters follow common practice: temperature, then top_k, top_p of what is left, then min_p; of equal
logits at the cut the lowest token ids are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from toka_engine.model.barred_words import apply_words
from toka_engine.model.cpu.gumbel import gumbel_noise
from toka_engine.model.cpu.masks import apply_masks
from toka_engine.model.cpu.penalties import apply_penalties
from toka_engine.model.cpu.vocabulary import Vocabulary, WholeVocabulary
from toka_engine.model.logit_edits import apply_edits, to_tensors
from toka_engine.model.sample_plan import Sampled, SamplePlan
from toka_engine.model.slot_state import HostSlots

ReadTokens: TypeAlias = Callable[[NDArray[np.int32], NDArray[np.int32]], NDArray[np.int64]]
"""Maps slots and lengths [k] to the first tokens of each slot, concatenated [sum(lengths)]."""
FindTokens: TypeAlias = Callable[[NDArray[np.int32], NDArray[np.int32]], NDArray[np.int32]]
"""Maps slots and positions [k] to the tokens there [k]."""

_BLOCK = 256
_FIRST_CANDIDATES = 1024
_NEGATIVE = float("-inf")


class CpuSampler:
    """A sample_plan.Sample. On several ranks, each is given the logits of its part of the vocabulary."""

    def __init__(
        self, seed: int, read_tokens: ReadTokens, find_tokens: FindTokens, vocabulary: Vocabulary | None = None
    ) -> None:
        """`seed` is the same on all ranks, and they sample the same. Without `vocabulary`, there is one rank."""
        # Not torch's generator: it keeps the lower half of a seed alone, so that one engine in 2**32 repeats another.
        self._generator = np.random.Generator(np.random.PCG64(seed))
        self._read_tokens, self._find_tokens = read_tokens, find_tokens
        self._vocabulary = WholeVocabulary() if vocabulary is None else vocabulary

    def __call__(
        self, logits: torch.Tensor, logit_rows: torch.Tensor | None, plan: SamplePlan, state: HostSlots
    ) -> Sampled:
        wide = logits.float()
        rows = torch.arange(plan.slots.size) if logit_rows is None else logit_rows
        # The sum finds -inf, which the maximum hides; NaN and +inf show in both.
        maxima = wide.amax(dim=1)
        is_finite = torch.isfinite(maxima) & torch.isfinite(logits.sum(dim=1, dtype=torch.float32))
        is_finite, maxima = self._vocabulary.join_all(is_finite), self._vocabulary.join_maxima(maxima)
        ids = torch.empty(plan.slots.size, dtype=torch.int64)
        is_plain = np.ones(plan.slots.size, np.bool_)
        if plan.changed_rows.size:
            is_plain[plan.changed_rows] = False
            changed, changed_rows = self._change(wide, rows, plan)
            changed_maxima = self._vocabulary.join_maxima(changed.amax(dim=1))
            self._fill(ids, ~is_plain, changed, changed_maxima, changed_rows, plan, state)
            # Where no token is left to be sampled, nothing is: the request fails like one of broken logits.
            ids[torch.from_numpy(plan.changed_rows)[torch.isneginf(changed_maxima)]] = -1
        self._fill(ids, is_plain, wide, maxima, rows, plan, state)
        ids.masked_fill_(~is_finite[rows], -1)
        return self._add_logprobs(ids.int(), wide, rows, plan)

    def _fill(
        self,
        ids: torch.Tensor,  # [R] int64, written
        members: NDArray[np.bool_],  # [R]: the rows to draw
        wide: torch.Tensor,  # [n, width] float32: logits of this rank's part of the vocabulary
        maxima: torch.Tensor,  # [n], over the whole vocabulary
        rows: torch.Tensor,  # [R] int64: row of `wide` of each member
        plan: SamplePlan,
        state: HostSlots,
    ) -> None:
        slots = torch.from_numpy(plan.slots.astype(np.int64))
        for of_kind, draw in (
            (plan.greedy, self._find_maxima),
            (plan.drawn, self._draw),
            (plan.seeded, self._draw_seeded),
        ):
            chosen = of_kind[members[of_kind]]
            if chosen.size:
                at = torch.from_numpy(chosen)
                is_whole = chosen.size == wide.shape[0] and bool((rows[at] == torch.arange(chosen.size)).all())
                x = wide if is_whole else wide[rows[at]]
                x = self._apply_filters(x, chosen, plan, slots[at], state) if plan.filtered.size else x
                ids[at] = draw(x, maxima[rows[at]], slots[at], state)

    def _change(self, wide: torch.Tensor, rows: torch.Tensor, plan: SamplePlan) -> tuple[torch.Tensor, torch.Tensor]:
        """Changed logits [k, width] of the rows that ask, and where each row's are [R] (others: anywhere)."""
        asking = torch.from_numpy(plan.changed_rows)
        changed = wide[rows[asking]]
        if plan.edits is not None:
            at = np.searchsorted(plan.changed_rows, plan.edits.rows).astype(np.int32)
            arrays = plan.edits.place(at, self._vocabulary.first, changed.shape[1])
            apply_edits(changed, to_tensors(arrays.to_words()))
        if plan.words is not None:
            at = np.searchsorted(plan.changed_rows, plan.words.rows).astype(np.int32)
            words = plan.words.arrays.place(at, self._vocabulary.first, changed.shape[1])
            found = torch.from_numpy(self._find_tokens(words.sources, words.positions))
            apply_words(changed, to_tensors(list(words)), found)
        if plan.penalties is not None:
            tokens = self._read_tokens(plan.penalties.sources, plan.penalties.lengths)
            places = np.searchsorted(plan.changed_rows, plan.penalties.rows)
            apply_penalties(changed, tokens, plan.penalties, self._vocabulary.first, places)
        if plan.masks is not None:
            places = np.searchsorted(plan.changed_rows, plan.grammatical)
            apply_masks(changed, places, plan.masks, self._vocabulary.first)
        return changed, torch.zeros_like(rows).index_copy_(0, asking, torch.arange(asking.shape[0]))

    def _draw(self, x: torch.Tensor, maxima: torch.Tensor, slots: torch.Tensor, state: HostSlots) -> torch.Tensor:
        """x [n, width] -> [n] ids by inverse transform over blocks."""
        weights = x.sub(maxima[:, None]).div_(state.tensor("temperature")[slots][:, None]).exp_()
        blocks = _view_blocks(weights, 0.0)
        sums = blocks.sum(dim=2, dtype=torch.float64)
        block = self._pick(sums)
        inside = blocks[torch.arange(x.shape[0]), block].double()
        return self._vocabulary.join_drawn(sums.sum(dim=1), block * _BLOCK + self._pick(inside), self._pick)

    def _pick(self, weights: torch.Tensor) -> torch.Tensor:
        """See vocabulary.Pick."""
        return _pick(weights, torch.from_numpy(self._generator.random((weights.shape[0], 1))))

    def _find_maxima(
        self, x: torch.Tensor, maxima: torch.Tensor, slots: torch.Tensor, state: HostSlots
    ) -> torch.Tensor:
        return self._find_best(x)

    def _draw_seeded(
        self, x: torch.Tensor, maxima: torch.Tensor, slots: torch.Tensor, state: HostSlots
    ) -> torch.Tensor:
        seeds, positions = state.tensor("seed")[slots], state.tensor("num_sampled")[slots]
        noise = gumbel_noise(seeds, positions, x.shape[1], self._vocabulary.first)
        return self._find_best(noise.add_(x / state.tensor("temperature")[slots][:, None]))

    def _find_best(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores [n, width] -> the lowest id [n] of each row's maximum over the whole vocabulary."""
        tokens = _find_first_maximum(scores)
        return self._vocabulary.join_best(scores.gather(1, tokens[:, None]).squeeze(1), tokens)

    def _apply_filters(
        self,
        x: torch.Tensor,  # [n, width]
        chosen: NDArray[np.int64],  # [n]: the plan's row of each
        plan: SamplePlan,
        slots: torch.Tensor,  # [n]
        state: HostSlots,
    ) -> torch.Tensor:
        """A copy of x with -inf for what top_k, top_p and min_p leave out, in the rows that ask."""
        asking = np.flatnonzero(np.isin(chosen, plan.filtered, assume_unique=True))
        if not asking.size:
            return x
        at = torch.from_numpy(asking)
        result = x.clone() if asking.size < x.shape[0] else x
        kept = keep_likeliest(
            self._vocabulary.widen(x[at]),
            state.tensor("temperature")[slots[at]],
            state.tensor("top_k")[slots[at]],
            state.tensor("top_p")[slots[at]],
            state.tensor("min_p")[slots[at]],
        )
        kept = self._vocabulary.narrow(kept)
        if result is x:
            return kept
        result[at] = kept
        return result

    def _add_logprobs(self, ids: torch.Tensor, wide: torch.Tensor, rows: torch.Tensor, plan: SamplePlan) -> Sampled:
        """Logprobs of the unscaled distribution for the rows that ask; NaN where the logits were not finite."""
        if not plan.has_logprobs:
            return Sampled(ids, None, None, None)
        log_sums = self._vocabulary.join_log_sums(torch.logsumexp(wide, dim=1))
        logprobs = self._vocabulary.find_logits(wide, rows, ids.long().clamp(min=0)) - log_sums[rows]
        logprobs.masked_fill_(ids < 0, float("nan"))
        if not plan.top.size:
            return Sampled(ids, logprobs, None, None)
        at = rows[torch.from_numpy(plan.top)]
        best = torch.topk(wide[at], min(plan.top_width, wide.shape[1]), dim=1)
        values, tokens = self._vocabulary.join_top(best.values, best.indices, plan.top_width)
        is_beyond = torch.arange(plan.top_width)[None, :] >= torch.from_numpy(plan.top_counts)[:, None]
        return Sampled(ids, logprobs, tokens.int().masked_fill_(is_beyond, -1), values - log_sums[at][:, None])


def _pick(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Index [n] drawn from weights [n, k] (float64, not normalised) with uniforms [n, 1] in [0, 1)."""
    sums = weights.cumsum(dim=1)
    index = torch.searchsorted(sums, uniforms * sums[:, -1:], right=True).squeeze(1)
    # Rounding may point one past the end: the last entry with weight is meant.
    last = weights.shape[1] - 1 - (weights > 0).flip(1).int().argmax(dim=1)
    return torch.minimum(index, last)


def _view_blocks(x: torch.Tensor, padding: float) -> torch.Tensor:
    """[n, vocab] -> [n, blocks, _BLOCK]."""
    rest = -x.shape[1] % _BLOCK
    padded = torch.nn.functional.pad(x, (0, rest), value=padding) if rest else x
    return padded.view(x.shape[0], -1, _BLOCK)


def _find_first_maximum(x: torch.Tensor) -> torch.Tensor:
    """The lowest index [n] of each row's maximum. By blocks: torch's argmax over a long row is ten times slower."""
    blocks = _view_blocks(x, _NEGATIVE)
    block = blocks.amax(dim=2).argmax(dim=1)
    return block * _BLOCK + blocks[torch.arange(x.shape[0]), block].argmax(dim=1)


def keep_likeliest(
    x: torch.Tensor,  # [n, vocab] float32
    temperatures: torch.Tensor,  # [n]
    top_ks: torch.Tensor,  # [n]; 0: off
    top_ps: torch.Tensor,  # [n]; 1: off
    min_ps: torch.Tensor,  # [n]; 0: off
) -> torch.Tensor:
    """x with -inf where a filter leaves a token out; exact over the whole vocabulary."""
    vocab = x.shape[1]
    parameters = (temperatures, top_ks, top_ps, min_ps)
    counts, thresholds, is_known = _find_cuts(x, min(vocab, _FIRST_CANDIDATES), *parameters)
    if not bool(is_known.all()):  # a flat distribution: sort those rows whole
        rest = torch.nonzero(~is_known).squeeze(1)
        counts[rest], thresholds[rest], _ = _find_cuts(x[rest], vocab, *(each[rest] for each in parameters))
    is_above, is_equal = x > thresholds[:, None], x == thresholds[:, None]
    num_equal = counts - is_above.sum(dim=1)
    is_kept = is_above | (is_equal & (is_equal.cumsum(dim=1) <= num_equal[:, None]))
    return x.masked_fill(~is_kept, _NEGATIVE)


def _find_cuts(
    x: torch.Tensor,
    width: int,
    temperatures: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return number of kept tokens, the last one's logit, and whether `width` candidates sufficed; [n] each."""
    vocab = x.shape[1]
    values = torch.topk(x, width, dim=1).values if width < vocab else x.sort(dim=1, descending=True).values
    limits = torch.where(top_ks > 0, top_ks.long().clamp(max=vocab), vocab)
    top = values[:, :1]
    weights = ((values - top) / temperatures[:, None]).double().exp()
    inside = torch.arange(width)[None, :] < limits[:, None]
    totals = ((x - top) / temperatures[:, None]).exp().sum(dim=1, dtype=torch.float64)
    totals = torch.where(limits <= width, (weights * inside).sum(dim=1), totals)
    before = weights.cumsum(dim=1) - weights  # a token stays while what comes before it is short of top_p
    is_kept = inside & ((before < (top_ps.double() * totals)[:, None]) | (top_ps >= 1.0)[:, None])
    is_kept &= weights >= min_ps.double()[:, None]
    is_kept[:, 0] = True
    counts = is_kept.sum(dim=1)
    thresholds = values.gather(1, (counts - 1)[:, None]).squeeze(1)
    return counts, thresholds, (counts < width) | (limits <= width) | (width == vocab)
