"""The plan of a step's samples, made on the host, and the sampler's interface. The same for all devices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from toka_engine.messages import Step
from toka_engine.model.barred_words import WordPlan
from toka_engine.model.logit_edits import EditPlan, plan_edits
from toka_engine.model.slot_state import HostSlots
from toka_engine.model.step_rows import find_sampled_rows

_NO_ROWS: NDArray[np.int64] = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class Penalties:
    """The k rows whose logits change by the tokens that their sequences have so far; arrays [k].

    A sequence's tokens are stored with its keys and values: when a row is sampled, the forward has just written the
    last of them. So nothing here waits for the host, however many steps are in flight.
    """

    rows: NDArray[np.int64]  # of the plan's R rows, ascending
    sources: NDArray[np.int32]  # the slot whose pages hold the row's tokens, from position 0
    lengths: NDArray[np.int32]  # how many tokens, prompt and generated
    num_generated: NDArray[np.int32]  # how many of these, the last ones, are generated
    presence: NDArray[np.float32]  # taken off the logit of each generated token
    frequency: NDArray[np.float32]  # taken off once for each time that it was generated
    repetition: NDArray[np.float32]  # divides positive logits of all tokens so far, multiplies negative ones

    def select(self, rows: NDArray[np.int64]) -> Penalties | None:
        """Return those of some of the plan's rows, ascending, as if there were no others; None if none asks."""
        is_chosen = np.isin(self.rows, rows, assume_unique=True)
        if not is_chosen.any():
            return None
        return Penalties(
            rows=np.searchsorted(rows, self.rows[is_chosen]),
            sources=self.sources[is_chosen],
            lengths=self.lengths[is_chosen],
            num_generated=self.num_generated[is_chosen],
            presence=self.presence[is_chosen],
            frequency=self.frequency[is_chosen],
            repetition=self.repetition[is_chosen],
        )


@dataclass(frozen=True, slots=True)
class SamplePlan:
    """The R samples of one step and, by row index, which of them need which extra work."""

    slots: NDArray[np.int32]  # [R]
    greedy: NDArray[np.int64]  # rows with temperature 0
    drawn: NDArray[np.int64]  # rows with temperature > 0 and no seed
    seeded: NDArray[np.int64]  # rows with temperature > 0 and a seed
    filtered: NDArray[np.int64]  # drawn or seeded rows with top_k, top_p or min_p
    has_logprobs: bool
    """Whether any row asks for the chosen token's logprob."""
    top: NDArray[np.int64]  # rows that ask for top logprobs
    top_counts: NDArray[np.int32]  # [rows of top]: how many
    top_width: int
    """The largest number of top logprobs that any row asks for."""
    penalties: Penalties | None = None
    """None if no row asks."""
    edits: EditPlan | None = None
    """None if no row asks."""
    words: WordPlan | None = None
    """None if no row's slot has any."""
    grammatical: NDArray[np.int64] = field(default_factory=lambda: _NO_ROWS)
    """Rows whose output follows a grammar, ascending."""
    masks: NDArray[np.int32] | None = None
    """[rows of grammatical, words]: bit i of word w allows token 32 * w + i. Filled in after the forward."""

    @property
    def changed_rows(self) -> NDArray[np.int64]:
        """Rows whose logits are not sampled as the model gives them, ascending."""
        rows = _NO_ROWS if self.penalties is None else self.penalties.rows
        if self.edits is not None:
            rows = np.union1d(rows, self.edits.rows)
        if self.words is not None:
            rows = np.union1d(rows, self.words.rows)
        return np.union1d(rows, self.grammatical) if self.grammatical.size else rows

    @property
    def is_plain(self) -> bool:
        """Whether no row asks for more than temperature."""
        is_changed = self.penalties is not None or self.edits is not None or self.words is not None
        return not (self.seeded.size or self.filtered.size or self.has_logprobs or is_changed or self.grammatical.size)

    def holds(self, host: HostSlots) -> bool:
        """Return whether the next step, of the same slots, may use this plan again."""
        if self.penalties is not None or self.words is not None or self.grammatical.size:
            return False
        edits = self.edits
        return edits is None or bool((host["num_sampled"][self.slots[edits.rows]] < edits.until).all())

    @property
    def whole_rows(self) -> NDArray[np.int64]:
        """The rows whose sampling needs the logits of the whole vocabulary in one place, ascending."""
        return np.unique(np.concatenate((self.filtered, self.top, self.changed_rows)))

    def select(self, rows: NDArray[np.int64]) -> SamplePlan:
        """Return the plan of some of the rows, ascending, as if there were no others."""

        def renumber(chosen: NDArray[np.int64]) -> NDArray[np.int64]:
            return np.searchsorted(rows, chosen[np.isin(chosen, rows, assume_unique=True)])

        return SamplePlan(
            slots=self.slots[rows],
            greedy=renumber(self.greedy),
            drawn=renumber(self.drawn),
            seeded=renumber(self.seeded),
            filtered=renumber(self.filtered),
            has_logprobs=self.has_logprobs,
            top=renumber(self.top),
            top_counts=self.top_counts[np.isin(self.top, rows, assume_unique=True)],
            top_width=self.top_width,
            penalties=None if self.penalties is None else self.penalties.select(rows),
            edits=None if self.edits is None else self.edits.select(rows),
            words=None if self.words is None else self.words.select(rows),
            grammatical=renumber(self.grammatical),
            masks=None if self.masks is None else self.masks[np.isin(self.grammatical, rows, assume_unique=True)],
        )


def plan_sampling(step: Step, host: HostSlots) -> SamplePlan:
    """Sort the rows that `step` samples by what they ask for. `host` is as before the step's forward."""
    slots = np.concatenate((step.decode_slots, step.fanout_slots))
    is_greedy = host["temperature"][slots] <= 0.0
    is_seeded = host["seed"][slots] >= 0
    num_logprobs = host["num_logprobs"][slots]
    return SamplePlan(
        slots=slots,
        greedy=np.flatnonzero(is_greedy),
        drawn=np.flatnonzero(~is_greedy & ~is_seeded),
        seeded=np.flatnonzero(~is_greedy & is_seeded),
        filtered=np.flatnonzero(host.is_filtered[slots]),
        has_logprobs=bool((num_logprobs >= 0).any()),
        top=np.flatnonzero(num_logprobs > 0),
        top_counts=num_logprobs[num_logprobs > 0],
        top_width=max(0, int(num_logprobs.max(initial=0))),
        penalties=_plan_penalties(step, slots, host),
        edits=_plan_edits(step, slots, host) if host.edits else None,
        words=_plan_words(step, slots, host) if host.words else None,
        grammatical=np.flatnonzero(host["grammar"][slots]),
    )


def _plan_edits(step: Step, slots: NDArray[np.int32], host: HostSlots) -> EditPlan | None:
    rows = np.flatnonzero(host["num_sampled"][slots] < host.edited_until[slots])
    if not rows.size:
        return None
    _, logit_rows = find_sampled_rows(step) if step.prefill_slots.size else (None, None)
    edited = slots[rows]
    return plan_edits(
        rows,
        rows.astype(np.int32) if logit_rows is None else logit_rows[rows],
        [host.edits[slot] for slot in edited.tolist()],
        host["num_sampled"][edited],
    )


def _plan_penalties(step: Step, slots: NDArray[np.int32], host: HostSlots) -> Penalties | None:
    rows = np.flatnonzero(host.has_penalties[slots])
    if not rows.size:
        return None
    sources, lengths = _find_tokens(step, host)
    asking = slots[rows]
    return Penalties(
        rows=rows,
        sources=sources[rows],
        lengths=lengths[rows],
        num_generated=host["num_sampled"][asking],
        presence=host["presence_penalty"][asking],
        frequency=host["frequency_penalty"][asking],
        repetition=host["repetition_penalty"][asking],
    )


def _plan_words(step: Step, slots: NDArray[np.int32], host: HostSlots) -> WordPlan | None:
    logit_rows = find_sampled_rows(step)[1] if step.prefill_slots.size else None
    return host.words.plan(slots, logit_rows, *_find_tokens(step, host), host["num_sampled"][slots])


def _find_tokens(step: Step, host: HostSlots) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return, for each sample, the slot whose pages hold its tokens so far, and how many these are."""
    # Choices of one prompt are first sampled from its chunk, before they have a copy of its last page.
    chunk_ends = step.prefill_starts + step.prefill_lengths
    sources = np.concatenate((step.decode_slots, step.prefill_slots[step.fanout_chunks]))
    lengths = np.concatenate((host["length"][step.decode_slots] + 1, chunk_ends[step.fanout_chunks]))
    return sources, lengths.astype(np.int32)


@dataclass(frozen=True, slots=True)
class Sampled:
    """Results on the device. Rows are the plan's."""

    ids: torch.Tensor  # [R] int32; -1: logits not finite
    logprobs: torch.Tensor | None  # [R] float32, of the model's own distribution; None if no row asks
    top_tokens: torch.Tensor | None  # [rows of plan.top, top_width] int32; -1 beyond what a row asks for
    top_logprobs: torch.Tensor | None  # [rows of plan.top, top_width] float32


class Sample(Protocol):
    def __call__(
        self,
        logits: torch.Tensor,  # [n, vocab], as make_head gives them
        logit_rows: torch.Tensor | None,  # [R] int64: row of logits of each sampled row; None: row i has logits i
        plan: SamplePlan,  # R rows
        state: HostSlots,
    ) -> Sampled:
        """Sample one token per row. Does not change `state`."""
        ...
