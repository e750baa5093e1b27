"""Samples tokens on a GPU, without a sort and without waiting. Only samples that ask for more than temperature pay."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from toka_engine.model.barred_words import apply_words
from toka_engine.model.cuda.attention import CudaAttention
from toka_engine.model.cuda.changed_rows import (
    find_copied_rows,
    pack_penalties,
    place_edits_in_copies,
    place_edits_in_place,
    place_masks_in_copies,
    place_masks_in_place,
    place_words_in_copies,
    place_words_in_place,
)
from toka_engine.model.cuda.staging import Staging
from toka_engine.model.in_flight import RING_SIZE
from toka_engine.model.kernels.device_slots import DeviceSlots
from toka_engine.model.kernels.filtering import apply_filters
from toka_engine.model.kernels.logit_penalties import PenaltyInputs, PenaltyWorkspace, apply_penalties
from toka_engine.model.kernels.masking import apply_masks
from toka_engine.model.kernels.sampling import Samples, Workspace, block_stats, sample_tokens
from toka_engine.model.kernels.seeded_sampling import add_noise
from toka_engine.model.kernels.top_k_gathering import gather_best
from toka_engine.model.kernels.top_p_rejection import sample_by_rejection
from toka_engine.model.logit_edits import EditArrays, apply_edits
from toka_engine.model.prompt_scores import PIECE_ROWS, score_logits
from toka_engine.model.sample_plan import Sample, Sampled, SamplePlan
from toka_engine.model.slot_state import HostSlots
from toka_engine.slot_parameters import MAX_GRAMMAR_STREAMS


class Sampler(Sample, Protocol):
    """A sample_plan.Sample that can also be captured in a graph, for rows that ask for no more than temperature."""

    def next_random(self) -> NDArray[np.int32]:
        """Return the random words [4] of one launch."""
        ...

    def sample_plain(self, logits: torch.Tensor, slots: torch.Tensor, random: torch.Tensor, ids: torch.Tensor) -> None:
        """Sample row i of logits for slots[i] into ids[i]; `random` [2] int64 is `next_random` on the device."""
        ...

    @property
    def max_whole_rows(self) -> int:
        """Rows that `widen` takes at a time."""
        ...

    def widen(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [n, width] of this rank's part of the vocabulary -> [n, vocab], valid until the next but one."""
        ...

    def check(self, ids: NDArray[np.int32]) -> None:
        """Raise RanksDisagreeError if the ids [n] of a step say that ranks had different steps in hand."""
        ...


_TOP_ROWS = 128
"""Rows at a time for which logprobs are computed from whole rows in fp32."""
_PENALTY_BYTES = 64 << 20
"""Bytes of fp32 logits at a time for samples whose logits are copied to be changed; token counts take as much again."""
_NUM_PENALTY_ARRAYS = 6


class CudaSampler:
    """A Sampler over the slots on the device, whose last tokens and sample counters it advances."""

    max_whole_rows = PIECE_ROWS

    def __init__(
        self, seed: int, state: DeviceSlots, attention: CudaAttention, max_samples: int, vocab_size: int
    ) -> None:
        """`attention` stores the tokens that penalties count."""
        device = state["temperature"].device
        self._seed, self._step, self._turn = seed, 0, 0
        self._state, self._attention = state, attention
        self._work = Workspace.allocate(max_samples, vocab_size, device)
        num_penalized = max(1, min(max_samples, _PENALTY_BYTES // (4 * vocab_size)))
        self._penalty_work = PenaltyWorkspace.allocate(num_penalized, vocab_size, device)
        # A step's results are copied out while later steps run; the last one of each is for parts of a step.
        self._ids = [torch.empty(max_samples, dtype=torch.int32, device=device) for _ in range(RING_SIZE + 1)]
        self._logprobs = [torch.empty(max_samples, dtype=torch.float32, device=device) for _ in range(RING_SIZE + 1)]
        self._in_order = torch.arange(max_samples, dtype=torch.int32, device=device)
        self._inputs = Staging(device)
        self._edit_inputs = Staging(device)
        self._edited_plan: SamplePlan | None = None
        self._edit_words: list[torch.Tensor] = []
        """The edits in place of `_edited_plan`, uploaded once for as many steps as it holds."""
        num_masks = min(max_samples, MAX_GRAMMAR_STREAMS)
        self._mask_buffer = torch.zeros((num_masks, -(-vocab_size // 32)), dtype=torch.int32, device=device)
        self._mask_inputs = Staging(device)
        self._word_inputs = Staging(device)
        self._masks: torch.Tensor | None = None
        """The masks of this step's plan, on the device."""

    def __call__(
        self, logits: torch.Tensor, logit_rows: torch.Tensor | None, plan: SamplePlan, state: HostSlots
    ) -> Sampled:
        """logits [n, vocab] fp32; see sample_plan.Sample. `state` is the host's mirror: the device has its own."""
        self._turn = (self._turn + 1) % RING_SIZE
        count = plan.slots.size
        rows = self._in_order[:count] if logit_rows is None else logit_rows
        ids = self._ids[self._turn][:count]
        logprobs = self._logprobs[self._turn][:count] if plan.has_logprobs else None
        copied = find_copied_rows(plan)
        if plan.edits is not None:
            self._edit_in_place(logits, plan, copied)
        if (words := place_words_in_place(plan, copied)) is not None:
            self._bar_words(logits, self._word_inputs.upload(*words))
        self._masks = None
        if plan.masks is not None:
            # Pinned memory, as the runner fills it, is copied without waiting for the device.
            masks = torch.from_numpy(plan.masks)
            self._masks = self._mask_buffer[: plan.grammatical.size].copy_(masks, non_blocking=True)
            (samples,) = self._mask_inputs.upload(place_masks_in_place(plan, copied))
            apply_masks(logits, rows, samples, self._masks)
        if not copied.size:
            slots, filtered, seeded, random, top, top_counts = self._inputs.upload(
                plan.slots,
                plan.filtered.astype(np.int32),
                plan.seeded.astype(np.int32),
                self.next_random(),
                plan.top.astype(np.int32),
                plan.top_counts,
            )
            self._sample(logits, Samples(rows, slots), filtered, seeded, random, ids, logprobs, seeded.shape[0] > 0)
        else:
            top, top_counts = self._sample_in_parts(logits, rows, plan, copied, ids, logprobs)
        if not plan.top.size:
            return Sampled(ids, logprobs, None, None)
        at = top.long()
        chosen, *tops = _find_top(logits, rows[at], ids[at], top_counts, plan.top_width)
        if logprobs is not None:  # of the formula that the likeliest tokens' are of: equal ones must compare as equal
            logprobs.index_copy_(0, at, chosen)
        return Sampled(ids, logprobs, *tops)

    def next_random(self) -> NDArray[np.int32]:
        """Return the random words [4] of one launch: engine seed and launch number."""
        self._step += 1
        return np.array([self._seed, self._step], "<i8").view("<i4")

    def sample_plain(
        self,
        logits: torch.Tensor,  # [n, vocab] fp32
        slots: torch.Tensor,  # [n] int32
        random: torch.Tensor,  # [2] int64: next_random
        ids: torch.Tensor,  # [n] int32, written
    ) -> None:
        """Sample row i for slots[i], none of which asks for more than temperature. Can be captured in a graph."""
        samples = Samples(self._in_order[: slots.shape[0]], slots)
        block_stats(logits, samples, self._state, self._work, False)
        sample_tokens(logits, samples, self._state, self._work, random, ids, None, False)

    def widen(self, logits: torch.Tensor) -> torch.Tensor:
        """See Sampler: they are those of the whole vocabulary."""
        return logits

    def check(self, ids: NDArray[np.int32]) -> None:
        """See Sampler: there is one rank."""

    def _sample(
        self,
        logits: torch.Tensor,
        samples: Samples,
        filtered: torch.Tensor,
        seeded: torch.Tensor,
        random: torch.Tensor,
        ids: torch.Tensor,
        logprobs: torch.Tensor | None,
        with_seeded: bool,
    ) -> None:
        state, work = self._state, self._work
        block_stats(logits, samples, state, work, logprobs is not None)
        sample_by_rejection(logits, samples, filtered, state, work, random.view(torch.int64))
        gather_best(logits, samples, filtered, state, work)
        apply_filters(logits, samples, filtered, state, work)
        add_noise(logits, samples, seeded, state, work)
        sample_tokens(logits, samples, state, work, random.view(torch.int64), ids, logprobs, with_seeded)

    # -------------------------------------------------------------- changed logits

    def _edit_in_place(self, logits: torch.Tensor, plan: SamplePlan, copied: NDArray[np.int64]) -> None:
        """Edit the logits of samples that need no copy."""
        if plan is not self._edited_plan:
            arrays = place_edits_in_place(plan, copied)
            self._edit_words = [] if arrays is None else self._edit_inputs.upload(*arrays.to_words())
            self._edited_plan = plan
        if self._edit_words:
            apply_edits(logits, self._edit_words)

    def _bar_words(self, logits: torch.Tensor, words: list[torch.Tensor]) -> None:
        """Bar words, uploaded as `WordArrays`, in `logits`, which they change in place."""
        if words[0].shape[0]:
            table, page_tokens = self._attention.table, self._attention.page_tokens
            sources, positions = words[-2].long(), words[-1].long()
            pages = table[sources, positions // page_tokens.shape[1]].long()
            apply_words(logits, words, page_tokens[pages, positions % page_tokens.shape[1]])

    def _sample_in_parts(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        plan: SamplePlan,
        copied: NDArray[np.int64],
        ids: torch.Tensor,
        logprobs: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample rows that are not copied, then the others, as many at a time as their fp32 logits have room for.

        Returns the plan's `top` and `top_counts` on the device. All inputs are uploaded at once: a second upload in a
        step could wait for the device.
        """
        is_plain = np.ones(plan.slots.size, np.bool_)
        is_plain[copied] = False
        size = self._penalty_work.num_rows
        parts = [np.flatnonzero(is_plain)] if is_plain.any() else []
        num_plain = len(parts)
        parts += [copied[begin : begin + size] for begin in range(0, copied.size, size)]
        arrays = [plan.top.astype(np.int32), plan.top_counts]
        bounds, max_lengths = [], []
        for index, chosen in enumerate(parts):
            begin = len(arrays)
            arrays += self._sampling_arrays(plan, chosen)
            if index >= num_plain:
                penalty_arrays = pack_penalties(plan, chosen)
                max_lengths.append(int(penalty_arrays[1].max()))
                arrays += [*penalty_arrays, place_masks_in_copies(plan, chosen)]
                arrays += [*place_edits_in_copies(plan, chosen), *place_words_in_copies(plan, chosen)]
            bounds.append(slice(begin, len(arrays)))
        uploaded = self._inputs.upload(*arrays)
        for index, bound in enumerate(bounds):
            max_length = max_lengths[index - num_plain] if index >= num_plain else 0
            self._sample_part(logits, rows, uploaded[bound], max_length, ids, logprobs)
        return uploaded[0], uploaded[1]

    def _sampling_arrays(self, plan: SamplePlan, chosen: NDArray[np.int64]) -> list[NDArray[np.int32]]:
        """Return rows and slots of a part, its filtered and seeded samples, and random words."""
        filtered = np.flatnonzero(np.isin(chosen, plan.filtered, assume_unique=True))
        seeded = np.flatnonzero(np.isin(chosen, plan.seeded, assume_unique=True))
        return [
            chosen.astype(np.int32),
            plan.slots[chosen],
            filtered.astype(np.int32),
            seeded.astype(np.int32),
            self.next_random(),
        ]

    def _sample_part(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        inputs: list[torch.Tensor],
        max_length: int,
        ids: torch.Tensor,
        logprobs: torch.Tensor | None,
    ) -> None:
        """`inputs`: what `_sample_in_parts` has uploaded for a part; `max_length`: the longest sequence's tokens to
        count.
        """
        chosen, slots, filtered, seeded, random, *changes = inputs
        index, count = chosen.long(), chosen.shape[0]
        logit_rows = rows.index_select(0, index)
        part_ids = self._ids[RING_SIZE][:count]
        if not changes:
            part_logprobs = None if logprobs is None else self._logprobs[RING_SIZE][:count]
            samples = Samples(logit_rows, slots)
            self._sample(logits, samples, filtered, seeded, random, part_ids, part_logprobs, seeded.shape[0] > 0)
        else:
            changed = self._change(logits, logit_rows, changes, max_length)
            samples = Samples(self._in_order[:count], slots)
            # One variant of the kernel, seeded or not: each takes a moment to compile at the start.
            self._sample(changed, samples, filtered, seeded, random, part_ids, None, True)
            part_logprobs = None if logprobs is None else _find_logprobs(logits, logit_rows, part_ids)
        ids.index_copy_(0, index, part_ids)
        if logprobs is not None and part_logprobs is not None:
            logprobs.index_copy_(0, index, part_logprobs)

    def _change(
        self, logits: torch.Tensor, logit_rows: torch.Tensor, changes: list[torch.Tensor], max_length: int
    ) -> torch.Tensor:
        """Return changed logits [m, vocab] fp32 of `logit_rows` [m]: edits, words, penalties, masks."""
        sources, lengths, num_generated, *factors = changes[:_NUM_PENALTY_ARRAYS]
        masked, *others = changes[_NUM_PENALTY_ARRAYS:]
        edits, words = others[: len(EditArrays._fields)], others[len(EditArrays._fields) :]
        count = sources.shape[0]
        if any(each.shape[0] for each in others):
            logits = torch.index_select(logits, 0, logit_rows, out=self._penalty_work.logits[:count])
            logit_rows = self._in_order[:count]
            apply_edits(logits, edits)
            self._bar_words(logits, words)
        changed = apply_penalties(
            logits,
            PenaltyInputs(logit_rows, sources, lengths, num_generated, *(each.view(torch.float32) for each in factors)),
            max_length,
            self._attention.table,
            self._attention.page_tokens,
            self._penalty_work,
        )
        if self._masks is not None:
            apply_masks(changed, self._in_order, masked, self._masks)
        return changed


def _find_logprobs(logits: torch.Tensor, logit_rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return logprobs [n] of `ids` in logits[logit_rows]; NaN where an id is -1."""
    parts = []
    for rows, chosen in zip(logit_rows.split(_TOP_ROWS), ids.split(_TOP_ROWS), strict=True):
        wide = logits.index_select(0, rows).float()
        values = wide.gather(1, chosen.clamp(min=0).long()[:, None])[:, 0]
        parts.append(values - torch.logsumexp(wide, dim=1))
    return torch.cat(parts).masked_fill_(ids < 0, float("nan"))


def _find_top(
    logits: torch.Tensor, logit_rows: torch.Tensor, ids: torch.Tensor, counts: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logprobs [n] of `ids` in logits[logit_rows], NaN where an id is -1, and the top tokens and logprobs
    [n, width]; token -1 beyond a row's count.
    """
    parts = []
    for rows, chosen in zip(logit_rows.split(_TOP_ROWS), ids.split(_TOP_ROWS), strict=True):
        wide = logits.index_select(0, rows).float()
        parts.append(score_logits(wide, chosen.clamp(min=0).long(), width))
    logprobs, _, tokens, values = (torch.cat(each) for each in zip(*parts, strict=True))
    is_beyond = torch.arange(width, device=logits.device)[None, :] >= counts[:, None]
    return logprobs.masked_fill_(ids < 0, float("nan")), tokens.masked_fill_(is_beyond, -1), values
