"""Decode steps of a real worker without manager and server: rows over shared prefixes and tokens of their own.

Every slot, its pages and the groups are laid out here; what a step takes is measured, not what it says. The contents of
the KV cache do not matter to the time, but that its pages are real memory does: they are written once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
import torch

from toka_engine.messages import Int32s, Step
from toka_engine.model.attention_backend import AttentionBackend, StepLayout
from toka_engine.model.backend import Launched
from toka_engine.model.cpu.attention import CpuAttention
from toka_engine.model.worker import Worker
from toka_engine.slot_parameters import SlotBatch

_PAGES_AT_ONCE = 64

Clock: TypeAlias = Callable[[], float]
"""Seconds since some moment: perf_counter, or process_time where a busy machine would disturb that."""


def ints(values: Any) -> Int32s:
    """Make an array of the dtype of messages.Step."""
    return np.ascontiguousarray(values, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of one step, averaged over those of one call."""

    step_s: float
    """Time by the clock: of all steps, by their number."""
    host_cpu_s: float
    """Median CPU time of the thread that launches one; on a CPU the work itself, or its share."""

    def with_least_of(self, other: Timing) -> Timing:
        return Timing(min(self.step_s, other.step_s), min(self.host_cpu_s, other.host_cpu_s))


class DecodeBench:
    """Slots [0, rows): `num_groups` equal groups over `shared` tokens each, and `own` tokens of each row.

    `shared` is rounded down to whole pages. Room for `max_steps` steps; each `time` begins where the first one did.
    """

    def __init__(
        self, worker: Worker, rows: int, shared: int, own: int, num_groups: int = 1, max_steps: int = 64
    ) -> None:
        """Raises SystemExit if the worker has too few slots, pages or positions."""
        self._worker, self._runner, self.rows = worker, worker.runner, rows
        self._max_steps = max_steps
        size = worker.ready.page_size
        shared_pages, own_pages = shared // size, -(-(own + max_steps) // size)
        self.shared, self.own = shared_pages * size, own
        num_groups = min(num_groups, rows) if shared_pages else 0
        num_used = num_groups * shared_pages
        self.num_pages = num_used + rows * own_pages
        columns = shared_pages + own_pages
        if self.num_pages > worker.ready.num_pages or columns > worker.ready.max_pages_per_seq:
            raise SystemExit(f"rows={rows} shared={shared} own={own} do not fit the KV cache or the model's positions")
        if rows > worker.ready.max_seqs:
            raise SystemExit(f"rows={rows} are more than max_seqs_per_forward={worker.ready.max_seqs}")
        first_rows = np.arange(num_groups) * rows // max(num_groups, 1)
        counts = np.diff(np.append(first_rows, rows)) if num_groups else np.empty(0, np.int64)
        table = np.empty((rows, columns), np.int32)
        if num_groups:
            group_of_row = np.repeat(np.arange(num_groups), counts)
            table[:, :shared_pages] = group_of_row[:, None] * shared_pages + np.arange(shared_pages)
        order = np.random.default_rng(0).permutation(rows * own_pages) + num_used
        table[:, shared_pages:] = order.reshape(rows, own_pages)
        self._table = table
        self._groups: dict[str, Any] = {
            "group_first_rows": ints(first_rows),
            "group_num_rows": ints(counts),
            "group_first_columns": ints(np.zeros(num_groups)),
            "group_num_columns": ints(np.full(num_groups, shared_pages)),
        }
        _write_pages(self._runner.attention, self.num_pages)

    def time(
        self, num_steps: int, is_grouped: bool, in_flight: int | None = None, clock: Clock = perf_counter
    ) -> Timing:
        """Run `num_steps` decode steps, `in_flight` at once (None: as many as the worker would)."""
        groups = self._groups if is_grouped else {}
        return self._time(
            Step(number=0, decode_slots=ints(np.arange(self.rows)), **groups), num_steps, in_flight, clock
        )

    def time_mixed(self, num_tokens: int, num_steps: int, clock: Clock = perf_counter) -> Timing:
        """Run steps of a row for each slot but the last, which prefills `num_tokens` from its start in each of them."""
        slot = ints([self.rows - 1])
        step = Step(
            number=0,
            decode_slots=ints(np.arange(self.rows - 1)),
            prefill_slots=slot,
            prefill_starts=ints([0]),
            prefill_lengths=ints([num_tokens]),
            prefill_tokens=ints(np.zeros(num_tokens)),
            fanout_slots=slot,
            fanout_chunks=ints([0]),
        )
        return self._time(step, num_steps, None, clock)

    def _time(self, step: Step, num_steps: int, in_flight: int | None, clock: Clock) -> Timing:
        """Run `step` again and again from where the slots begin."""
        if num_steps > self._max_steps:
            raise ValueError(f"{num_steps} steps where there is room for {self._max_steps}")
        self._reset()
        depth = in_flight or self._runner.max_steps_in_flight
        flight: deque[Launched] = deque()
        host_cpu_s = []
        began_s = clock()
        for _ in range(num_steps):
            flight.append(self._runner.launch(step))
            if len(flight) == depth:
                host_cpu_s.append(self._runner.finish(flight.popleft()).host_cpu_s)
        while flight:
            host_cpu_s.append(self._runner.finish(flight.popleft()).host_cpu_s)
        return Timing((clock() - began_s) / num_steps, float(np.median(host_cpu_s)))

    def time_prefill(self, num_tokens: int, clock: Clock = perf_counter) -> float:
        """Seconds of a step that prefills `num_tokens` from the start of slot 0, over its first pages."""
        self._reset()
        slot = ints([0])
        step = Step(
            number=0,
            prefill_slots=slot,
            prefill_starts=slot,
            prefill_lengths=ints([num_tokens]),
            prefill_tokens=ints(np.zeros(num_tokens)),
            fanout_slots=slot,
            fanout_chunks=slot,
        )
        began_s = clock()
        self._runner.finish(self._runner.launch(step))
        return clock() - began_s

    def _reset(self) -> None:
        """Put every slot back to its first length, with its pages."""
        rows, columns = self._table.shape
        step = Step(
            number=0,
            new=SlotBatch.of(np.arange(rows), length=self.shared + self.own),
            append_slots=ints(np.repeat(np.arange(rows), columns)),
            append_indices=ints(np.tile(np.arange(columns), rows)),
            append_pages=self._table.reshape(-1),
        )
        self._runner.finish(self._runner.launch(step))


@torch.inference_mode()
def _write_pages(attention: AttentionBackend, num_pages: int) -> None:
    """Give the first pages memory: a CPU's cache is one page of zeros until it is written."""
    for first in range(1, num_pages, _PAGES_AT_ONCE):
        target = ints(np.arange(first, min(num_pages, first + _PAGES_AT_ONCE)))
        attention.copy_pages(ints(np.zeros(target.size)), target)


@contextmanager
def attention_skipped(worker: Worker) -> Iterator[None]:
    """Meanwhile the worker's decode steps do all but attend: they still plan, rotate, and write keys and values.

    The backends have no such switch, since an engine has no use for it: this replaces the methods that attend. Graphs
    are captured anew.
    """
    attention = worker.runner.attention
    names = skip_attention(attention)
    worker.runner.capture_graphs()
    try:
        yield
    finally:
        for name in names:
            delattr(attention, name)
        worker.runner.capture_graphs()


def skip_attention(attention: AttentionBackend) -> list[str]:
    """Replace methods of this one object; returns their names, to be deleted from it."""
    if isinstance(attention, CpuAttention):
        replaced = {"plan": _plan_without_attention(attention), "forward": _forward_to_zeros(attention)}
    else:
        replaced = {"_attend_decode": _append_alone(attention)}
    for name, method in replaced.items():
        getattr(attention, name)  # a backend without it is not one that this knows
        setattr(attention, name, method)
    return list(replaced)


def _plan_without_attention(attention: CpuAttention) -> Callable[[StepLayout], None]:
    plan_all = attention.plan

    def plan(layout: StepLayout) -> None:
        plan_all(layout)
        planned = attention._plan
        assert planned is not None, "plan has just made it"
        planned.buckets.clear()
        planned.groups.clear()

    return plan


def _append_alone(attention: Any) -> Callable[..., None]:
    from toka_engine.model.kernels.rope_append import rope_append

    def attend_decode(
        step: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos_sin: torch.Tensor,
        cache: Any,
        out: torch.Tensor,
    ) -> None:
        rope_append(q, k, v, cos_sin, step.slots, step.positions, attention.table, cache.keys, cache.values, out)
        out.zero_()

    return attend_decode


def _forward_to_zeros(attention: CpuAttention) -> Callable[..., torch.Tensor]:
    forward_all = attention.forward

    def forward(*arguments: Any) -> torch.Tensor:
        return forward_all(*arguments).zero_()

    return forward
