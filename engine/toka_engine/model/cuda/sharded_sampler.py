"""Samples tokens where several GPU ranks hold the logits of parts of the vocabulary. Exact for every parameter.

Greedy, plain and seeded rows are sampled on the parts, with one small exchange. Rows with filters, penalties or top
logprobs are gathered whole on every rank, as many at a time as there is room for, and sampled there as on one GPU. All
ranks compute with the same bits, so they sample the same tokens, and each keeps its own slots' state.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from toka_engine.errors import RanksDisagreeError
from toka_engine.model.cuda.attention import CudaAttention
from toka_engine.model.cuda.peer_links import PeerLinks
from toka_engine.model.cuda.sampler import CudaSampler
from toka_engine.model.cuda.staging import Staging
from toka_engine.model.in_flight import RING_SIZE
from toka_engine.model.kernels.device_slots import DeviceSlots
from toka_engine.model.kernels.row_gathering import NUM_BUFFERS, gather_rows
from toka_engine.model.kernels.sampling import Samples, Workspace, block_stats
from toka_engine.model.kernels.seeded_sampling import add_noise
from toka_engine.model.kernels.sharded_sampling import DISAGREES, sample_sharded
from toka_engine.model.prompt_scores import PIECE_ROWS
from toka_engine.model.sample_plan import Sampled, SamplePlan
from toka_engine.model.slot_state import HostSlots


class ShardedSampler:
    """A sample_plan.Sample for one rank's part of the vocabulary."""

    def __init__(
        self, seed: int, state: DeviceSlots, attention: CudaAttention, max_samples: int, links: PeerLinks, width: int
    ) -> None:
        """`width`: tokens of this rank's part."""
        device = state["temperature"].device
        self._state, self._links, self._num_gathers, self._turn = state, links, 0, 0
        self._whole = CudaSampler(seed, state, attention, links.rows.max_rows, links.rows.vocab_size)
        self._work = Workspace.allocate(max_samples, width, device, room=1)
        # A step's results are copied out while later steps run; the last one of each is for parts of a step.
        self._ids = [torch.empty(max_samples, dtype=torch.int32, device=device) for _ in range(RING_SIZE + 1)]
        self._logprobs = [torch.empty(max_samples, dtype=torch.float32, device=device) for _ in range(RING_SIZE + 1)]
        self._in_order = torch.arange(max(max_samples, PIECE_ROWS), dtype=torch.int32, device=device)
        self._inputs = Staging(device)

    def __call__(
        self, logits: torch.Tensor, logit_rows: torch.Tensor | None, plan: SamplePlan, state: HostSlots
    ) -> Sampled:
        """logits [n, width] fp32; see sample_plan.Sample. `state` is the host's mirror: the device has its own."""
        self._turn = (self._turn + 1) % RING_SIZE
        count = plan.slots.size
        rows = self._in_order[:count] if logit_rows is None else logit_rows
        ids = self._ids[self._turn][:count]
        logprobs = self._logprobs[self._turn][:count] if plan.has_logprobs else None
        whole = plan.whole_rows
        if not whole.size:
            slots, seeded, random = self._inputs.upload(plan.slots, plan.seeded.astype(np.int32), self.next_random())
            self._sample_parts(logits, Samples(rows, slots), seeded, random.view(torch.int64), ids, logprobs)
            return Sampled(ids, logprobs, None, None)
        return self._sample_mixed(logits, rows, plan, whole, state, ids, logprobs)

    def next_random(self) -> NDArray[np.int32]:
        """Return the random words [4] of one launch: engine seed and launch number."""
        return self._whole.next_random()

    def sample_plain(
        self,
        logits: torch.Tensor,  # [n, width] fp32
        slots: torch.Tensor,  # [n] int32
        random: torch.Tensor,  # [2] int64: next_random
        ids: torch.Tensor,  # [n] int32, written
    ) -> None:
        """Sample row i for slots[i], none of which asks for more than temperature. Can be captured in a graph."""
        samples = Samples(self._in_order[: slots.shape[0]], slots)
        self._sample_parts(logits, samples, slots[:0], random, ids, None)

    @property
    def max_whole_rows(self) -> int:
        """See cuda.sampler.Sampler."""
        return min(PIECE_ROWS, self._links.rows.max_rows)

    def widen(self, logits: torch.Tensor) -> torch.Tensor:
        """See cuda.sampler.Sampler."""
        return self._gather(logits, self._in_order[: logits.shape[0]])

    def check(self, ids: NDArray[np.int32]) -> None:
        """Raise RanksDisagreeError if the ranks had different steps in hand when they chose these ids."""
        if (ids == DISAGREES).any():
            _, own, other = self._links.candidates.disagreement.tolist()
            raise RanksDisagreeError(
                f"rank {self._links.candidates.rank} sampled with check word {own}, another rank with {other}"
            )

    def _sample_parts(
        self,
        logits: torch.Tensor,
        samples: Samples,
        seeded: torch.Tensor,
        random: torch.Tensor,
        ids: torch.Tensor,
        logprobs: torch.Tensor | None,
    ) -> None:
        """Sample rows without filters from the ranks' parts of the vocabulary."""
        state, work, first = self._state, self._work, self._links.rows.first
        block_stats(logits, samples, state, work, logprobs is not None)
        add_noise(logits, samples, seeded, state, work, first)
        has_seeded = seeded.shape[0] > 0
        sample_sharded(logits, first, samples, state, work, random, ids, logprobs, has_seeded, self._links.candidates)

    def _sample_mixed(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        plan: SamplePlan,
        whole: NDArray[np.int64],
        state: HostSlots,
        ids: torch.Tensor,
        logprobs: torch.Tensor | None,
    ) -> Sampled:
        """Sample the rows `whole` from gathered rows, and the others from the parts."""
        others = np.setdiff1d(np.arange(plan.slots.size), whole, assume_unique=True)
        rest, size = plan.select(others), self._links.rows.max_rows
        spans = [whole[begin : begin + size] for begin in range(0, whole.size, size)]
        index, slots, seeded, random, *indices = self._inputs.upload(
            others.astype(np.int32),
            rest.slots,
            rest.seeded.astype(np.int32),
            self.next_random(),
            *(span.astype(np.int32) for span in spans),
        )
        if others.size:
            count, part_ids = others.size, self._ids[RING_SIZE][: others.size]
            part_logprobs = None if logprobs is None else self._logprobs[RING_SIZE][:count]
            samples = Samples(rows.index_select(0, index), slots)
            self._sample_parts(logits, samples, seeded, random.view(torch.int64), part_ids, part_logprobs)
            _scatter(Sampled(part_ids, part_logprobs, None, None), index, ids, logprobs)
        tops = []
        for span, at in zip(spans, indices, strict=True):
            gathered = self._gather(logits, rows.index_select(0, at))
            sampled = self._whole(gathered, None, plan.select(span), state)
            _scatter(sampled, at, ids, logprobs)
            if sampled.top_tokens is not None and sampled.top_logprobs is not None:
                tops.append((sampled.top_tokens, sampled.top_logprobs))
        if not tops:
            return Sampled(ids, logprobs, None, None)
        return Sampled(ids, logprobs, torch.cat([each for each, _ in tops]), torch.cat([each for _, each in tops]))

    def _gather(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return logits[rows] over the whole vocabulary, until the next call but one."""
        buffer = self._num_gathers % NUM_BUFFERS
        self._num_gathers += 1
        return gather_rows(logits, rows, self._links.rows, buffer)


def _scatter(part: Sampled, index: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor | None) -> None:
    """Write a part's results to the rows `index` of the step's."""
    ids.index_copy_(0, index.long(), part.ids)
    if logprobs is not None and part.logprobs is not None:
        logprobs.index_copy_(0, index.long(), part.logprobs)
