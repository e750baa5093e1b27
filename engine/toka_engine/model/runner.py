"""Executes one Step on the device: state, pages, forward, sample. Knows no sockets and no files.

`launch` starts a step and `finish` waits for its tokens, so that a device with a queue can have several in flight; on a
CPU the work is done when `launch` returns. The forward of decode rows alone goes through `decode_forward`, which a
device may replace by CUDA graphs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from toka_engine.messages import Int32s, Step, Tokens
from toka_engine.model.attention_backend import AttentionBackend, StepLayout
from toka_engine.model.causal import CausalModel
from toka_engine.model.sample_plan import Sample, Sampled, SamplePlan, plan_sampling
from toka_engine.model.slot_state import SlotState


@dataclass(frozen=True, slots=True)
class Launched:
    """A step whose tokens may still be on the device."""

    number: int
    plan: SamplePlan
    sampled: Sampled | None
    """None: the step sampled nothing."""
    started_s: float
    host_cpu_s: float


class Runner:
    """Runs steps in order on one device."""

    def __init__(
        self,
        model: CausalModel,
        attention: AttentionBackend,
        state: SlotState,
        sample: Sample,
        has_repeatable_rows: bool,
    ) -> None:
        """`has_repeatable_rows`: a row's result does not depend on the rows beside it. Then seeded rows stay out of
        Hydragen groups, whose merge rounds differently, and the same request gives the same text whatever else runs.
        """
        self.model = model
        self.attention = attention
        self.state = state
        self.sample = sample
        self._has_repeatable_rows = has_repeatable_rows

    def prepare(self) -> None:
        """Called after the warm-up steps, and whenever what graphs hold has changed: a device may capture them."""

    @torch.inference_mode()
    def launch(self, step: Step) -> Launched:
        """Apply `step` and start its forward and sampling."""
        started_s, cpu_s = time.monotonic(), time.thread_time()
        self.state.set_up(step)
        if step.append_slots.size:
            self.attention.append_pages(step.append_slots, step.append_indices, step.append_pages)
        if step.copy_from.size:
            self.attention.copy_pages(step.copy_from, step.copy_to)
        plan = plan_sampling(step, self.state.host)
        sampled = self._forward_and_sample(step, plan)
        self.state.advance(step)
        return Launched(step.number, plan, sampled, started_s, time.thread_time() - cpu_s)

    def finish(self, launched: Launched) -> Tokens:
        """Wait for the tokens of `launched`."""
        sampled, plan = launched.sampled, launched.plan
        wall_s = time.monotonic() - launched.started_s
        if sampled is None:
            ids = np.empty(0, np.int32)
            return Tokens(launched.number, ids, step_wall_s=wall_s, host_cpu_s=launched.host_cpu_s)
        ids = sampled.ids.cpu().numpy()
        empty = np.empty(0, np.float32)
        logprobs = empty if sampled.logprobs is None else sampled.logprobs.cpu().numpy()
        if sampled.top_tokens is None or sampled.top_logprobs is None:
            return Tokens(launched.number, ids, logprobs, step_wall_s=wall_s, host_cpu_s=launched.host_cpu_s)
        return Tokens(
            launched.number,
            ids,
            logprobs,
            top_rows=plan.top.astype(np.int32),
            top_tokens=sampled.top_tokens.cpu().numpy().reshape(-1),
            top_logprobs=sampled.top_logprobs.cpu().numpy().reshape(-1),
            top_width=plan.top_width,
            step_wall_s=wall_s,
            host_cpu_s=launched.host_cpu_s,
        )

    def _forward_and_sample(self, step: Step, plan: SamplePlan) -> Sampled | None:
        logits, logit_rows = self._forward(step)
        if not plan.slots.size:
            return None
        sampled = self.sample(logits, logit_rows, plan, self.state)
        slots = self._to_device(plan.slots).long()
        # The next step may be planned before anybody has seen a -1: its row must stay a valid token.
        self.state.last_tokens.index_copy_(0, slots, sampled.ids.clamp(min=0))
        return sampled

    def _forward(self, step: Step) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return logits and, where rows of the sampler share logits, each row's index into them."""
        layout = self._make_layout(step)
        self.attention.plan(layout)
        slots = self._to_device(step.decode_slots)
        if not step.prefill_slots.size:
            return self._forward_decode(slots), None
        ids = torch.cat((self.state.last_tokens[slots.long()], self._to_device(step.prefill_tokens)))
        self.attention.write_tokens(ids)
        num_decode = step.decode_slots.size
        chunks, chunk_of_entry = np.unique(step.fanout_chunks, return_inverse=True)
        last_rows = num_decode + np.cumsum(step.prefill_lengths, dtype=np.int64) - 1
        rows = np.concatenate((np.arange(num_decode, dtype=np.int64), last_rows[chunks]))
        logits = self.model.logits(self.model.forward(ids, self.attention, self._to_device(rows)))
        if chunks.size == step.fanout_chunks.size and (chunks == step.fanout_chunks).all():
            return logits, None
        logit_rows = np.concatenate((np.arange(num_decode, dtype=np.int64), num_decode + chunk_of_entry.reshape(-1)))
        return logits, self._to_device(logit_rows)

    def _forward_decode(self, slots: torch.Tensor) -> torch.Tensor:
        ids = self.state.last_tokens[slots.long()]
        self.attention.write_tokens(ids)
        return self.model.logits(self.model.forward(ids, self.attention))

    def _make_layout(self, step: Step) -> StepLayout:
        groups = (
            step.group_first_rows,
            step.group_num_rows,
            step.group_first_columns,
            step.group_num_columns,
        )
        if self._has_repeatable_rows and step.group_first_rows.size:
            is_seeded = self.state.host.seeds[step.decode_slots] >= 0
            if is_seeded.any():
                groups = leave_out_rows(is_seeded, *groups)
        return StepLayout(
            step.decode_slots,
            self.state.host.lengths[step.decode_slots],
            step.prefill_slots,
            step.prefill_starts,
            step.prefill_lengths,
            *groups,
        )

    def _to_device(self, array: np.ndarray[tuple[int], np.dtype[np.generic]]) -> torch.Tensor:
        # Arrays decoded from a frame are read-only, which torch cannot express: hence the copy.
        tensor = torch.from_numpy(array.copy() if not array.flags.writeable else array)
        return tensor if self.state.device.type == "cpu" else tensor.to(self.state.device, non_blocking=True)


def leave_out_rows(
    is_left_out: NDArray[np.bool_],  # [d]
    first_rows: Int32s,
    num_rows: Int32s,
    first_columns: Int32s,
    num_columns: Int32s,
) -> tuple[Int32s, Int32s, Int32s, Int32s]:
    """Cut Hydragen groups [g] into the runs of their rows that stay. A row leaves all its groups or none."""
    parts: list[tuple[int, int, int, int]] = []
    for first, count, column, columns in zip(
        first_rows.tolist(), num_rows.tolist(), first_columns.tolist(), num_columns.tolist(), strict=True
    ):
        stays = np.concatenate(([False], ~is_left_out[first : first + count], [False]))
        edges = np.flatnonzero(stays[1:] != stays[:-1])
        parts.extend((first + begin, end - begin, column, columns) for begin, end in edges.reshape(-1, 2).tolist())
    table = np.array(parts, np.int32).reshape(-1, 4)
    return table[:, 0], table[:, 1], table[:, 2], table[:, 3]
