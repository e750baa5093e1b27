"""Draws tokens on a GPU: sorts nothing, waits for nothing; only samples that ask for more than temperature pay."""

from __future__ import annotations

import numpy as np
import torch

from toka_engine.model.kernels.filtering import apply_filters
from toka_engine.model.kernels.gumbel import add_noise
from toka_engine.model.kernels.sampling import Samples, Workspace, block_stats, draw
from toka_engine.model.kernels.slots import SlotState
from toka_engine.model.sampling import Sampled, SamplePlan
from toka_engine.model.staging import Staging
from toka_engine.model.state import SlotState as HostState

_OUTPUTS = 4
"""Result buffers in turn: a step's results are copied out while later steps run. More than the steps in flight."""
_TOP_ROWS = 128
"""Rows at a time for top logprobs, which are made in fp32."""


class GpuSampler:
    """An ops.Sample over the slots' state on the device, whose last tokens and draw counters it advances."""

    def __init__(self, seed: int, state: SlotState, max_samples: int, vocab_size: int) -> None:
        device = state.temperature.device
        self._seed, self._step, self._state = seed, 0, state
        self._work = Workspace.allocate(max_samples, vocab_size, device)
        self._ids = [torch.empty(max_samples, dtype=torch.int32, device=device) for _ in range(_OUTPUTS)]
        self._logprobs = [torch.empty(max_samples, dtype=torch.float32, device=device) for _ in range(_OUTPUTS)]
        self._in_order = torch.arange(max_samples, dtype=torch.int32, device=device)
        self._inputs = Staging(device)

    def __call__(
        self, logits: torch.Tensor, logit_rows: torch.Tensor | None, plan: SamplePlan, state: HostState
    ) -> Sampled:
        """logits [n, vocab] bf16; see ops.Sample. `state` is the host's mirror: the device has its own."""
        self._step += 1
        turn, count = self._step % _OUTPUTS, plan.slots.size
        random = np.array([self._seed, self._step], "<i8").view("<i4")
        slots, filtered, seeded, random_words, top, top_counts = self._inputs.upload(
            plan.slots,
            plan.filtered.astype(np.int32),
            plan.seeded.astype(np.int32),
            random,
            plan.top.astype(np.int32),
            plan.top_counts,
        )
        samples = Samples(self._in_order[:count] if logit_rows is None else logit_rows, slots)
        work, device_state = self._work, self._state
        block_stats(logits, samples, device_state, work, plan.has_logprobs)
        apply_filters(logits, samples, filtered, device_state, work)
        add_noise(logits, samples, seeded, device_state, work)
        ids, logprobs = self._ids[turn][:count], self._logprobs[turn][:count]
        draw(
            logits,
            samples,
            device_state,
            work,
            random_words.view(torch.int64),
            ids,
            logprobs if plan.has_logprobs else None,
            with_seeded=plan.seeded.size > 0,
        )
        if not plan.top.size:
            return Sampled(ids, logprobs if plan.has_logprobs else None, None, None)
        return Sampled(ids, logprobs, *_find_top(logits, samples.logit_rows[top], top_counts, plan.top_width))


def _find_top(
    logits: torch.Tensor, logit_rows: torch.Tensor, counts: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest tokens and their logprobs of logits[logit_rows], [n, width]; beyond a row's count: token -1."""
    tokens, logprobs = [], []
    for rows in logit_rows.split(_TOP_ROWS):
        wide = logits.index_select(0, rows).float()
        best = torch.topk(wide, width, dim=1)
        tokens.append(best.indices.int())
        logprobs.append(best.values - torch.logsumexp(wide, dim=1, keepdim=True))
    is_beyond = torch.arange(width, device=logits.device)[None, :] >= counts[:, None]
    return torch.cat(tokens).masked_fill_(is_beyond, -1), torch.cat(logprobs)
