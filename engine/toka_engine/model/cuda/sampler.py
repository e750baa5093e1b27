"""Samples tokens on a GPU, without a sort and without waiting. Only samples that ask for more than temperature pay."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from toka_engine.model.cuda.attention import CudaAttention
from toka_engine.model.cuda.staging import Staging
from toka_engine.model.in_flight import RING_SIZE
from toka_engine.model.kernels.device_slots import DeviceSlots
from toka_engine.model.kernels.filtering import apply_filters
from toka_engine.model.kernels.logit_penalties import PenaltyInputs, PenaltyWorkspace, apply_penalties
from toka_engine.model.kernels.sampling import Samples, Workspace, block_stats, sample_tokens
from toka_engine.model.kernels.seeded_sampling import add_noise
from toka_engine.model.kernels.top_k_gathering import gather_best
from toka_engine.model.kernels.top_p_rejection import sample_by_rejection
from toka_engine.model.sample_plan import Penalties, Sampled, SamplePlan
from toka_engine.model.slot_state import HostSlots

_TOP_ROWS = 128
"""Rows at a time for which logprobs are computed from whole rows in fp32."""
_PENALTY_BYTES = 64 << 20
"""Bytes of fp32 logits at a time for samples with penalties; their token counts take as much again."""


class CudaSampler:
    """A sample_plan.Sample over the slots on the device, whose last tokens and sample counters it advances."""

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

    def __call__(
        self, logits: torch.Tensor, logit_rows: torch.Tensor | None, plan: SamplePlan, state: HostSlots
    ) -> Sampled:
        """logits [n, vocab] fp32; see sample_plan.Sample. `state` is the host's mirror: the device has its own."""
        self._turn = (self._turn + 1) % RING_SIZE
        count = plan.slots.size
        rows = self._in_order[:count] if logit_rows is None else logit_rows
        ids = self._ids[self._turn][:count]
        logprobs = self._logprobs[self._turn][:count] if plan.has_logprobs else None
        if plan.penalties is None:
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
            top, top_counts = self._sample_in_parts(logits, rows, plan, plan.penalties, ids, logprobs)
        if not plan.top.size:
            return Sampled(ids, logprobs, None, None)
        return Sampled(ids, logprobs, *_find_top(logits, rows[top], top_counts, plan.top_width))

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

    # -------------------------------------------------------------- penalties

    def _sample_in_parts(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        plan: SamplePlan,
        penalties: Penalties,
        ids: torch.Tensor,
        logprobs: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample rows without penalties, then the others, as many at a time as their fp32 logits have room for.

        Returns the plan's `top` and `top_counts` on the device. All inputs are uploaded at once: a second upload in a
        step could wait for the device.
        """
        is_plain = np.ones(plan.slots.size, np.bool_)
        is_plain[penalties.rows] = False
        size = self._penalty_work.num_rows
        spans = [slice(begin, begin + size) for begin in range(0, penalties.rows.size, size)]
        parts = [(penalties.rows[span], span) for span in spans]
        if is_plain.any():
            parts.insert(0, (np.flatnonzero(is_plain), slice(0, 0)))
        arrays = [plan.top.astype(np.int32), plan.top_counts]
        for chosen, span in parts:
            arrays += [*self._sampling_arrays(plan, chosen), *_penalty_arrays(penalties, span)]
        uploaded = self._inputs.upload(*arrays)
        per_part = (len(arrays) - 2) // len(parts)
        for index, (_, span) in enumerate(parts):
            inputs = uploaded[2 + index * per_part : 2 + (index + 1) * per_part]
            max_length = int(penalties.lengths[span].max(initial=0))
            self._sample_part(logits, rows, inputs, max_length, ids, logprobs)
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
        """`inputs` as _sampling_arrays and _penalty_arrays make them; `max_length` 0: a part without penalties."""
        chosen, slots, filtered, seeded, random, *penalty_inputs = inputs
        index, count = chosen.long(), chosen.shape[0]
        logit_rows = rows.index_select(0, index)
        part_ids = self._ids[RING_SIZE][:count]
        if not max_length:
            part_logprobs = None if logprobs is None else self._logprobs[RING_SIZE][:count]
            samples = Samples(logit_rows, slots)
            self._sample(logits, samples, filtered, seeded, random, part_ids, part_logprobs, seeded.shape[0] > 0)
        else:
            sources, lengths, num_generated, *factors = penalty_inputs
            presence, frequency, repetition = (factor.view(torch.float32) for factor in factors)
            changed = apply_penalties(
                logits,
                PenaltyInputs(logit_rows, sources, lengths, num_generated, presence, frequency, repetition),
                max_length,
                self._attention.table,
                self._attention.page_tokens,
                self._penalty_work,
            )
            samples = Samples(self._in_order[:count], slots)
            # One variant of the kernel, seeded or not: each takes a moment to compile at the start.
            self._sample(changed, samples, filtered, seeded, random, part_ids, None, True)
            part_logprobs = None if logprobs is None else _find_logprobs(logits, logit_rows, part_ids)
        ids.index_copy_(0, index, part_ids)
        if logprobs is not None and part_logprobs is not None:
            logprobs.index_copy_(0, index, part_logprobs)


def _penalty_arrays(penalties: Penalties, span: slice) -> list[NDArray[np.int32]]:
    return [
        penalties.sources[span],
        penalties.lengths[span],
        penalties.num_generated[span],
        *(each[span].view(np.int32) for each in (penalties.presence, penalties.frequency, penalties.repetition)),
    ]


def _find_logprobs(logits: torch.Tensor, logit_rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return logprobs [n] of `ids` in logits[logit_rows]; NaN where an id is -1."""
    parts = []
    for rows, chosen in zip(logit_rows.split(_TOP_ROWS), ids.split(_TOP_ROWS), strict=True):
        wide = logits.index_select(0, rows).float()
        values = wide.gather(1, chosen.clamp(min=0).long()[:, None])[:, 0]
        parts.append(values - torch.logsumexp(wide, dim=1))
    return torch.cat(parts).masked_fill_(ids < 0, float("nan"))


def _find_top(
    logits: torch.Tensor, logit_rows: torch.Tensor, counts: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the top tokens and logprobs [n, width] of logits[logit_rows]; token -1 beyond a row's count."""
    tokens, logprobs = [], []
    for rows in logit_rows.split(_TOP_ROWS):
        wide = logits.index_select(0, rows).float()
        best = torch.topk(wide, width, dim=1)
        tokens.append(best.indices.int())
        logprobs.append(best.values - torch.logsumexp(wide, dim=1, keepdim=True))
    is_beyond = torch.arange(width, device=logits.device)[None, :] >= counts[:, None]
    return torch.cat(tokens).masked_fill_(is_beyond, -1), torch.cat(logprobs)
