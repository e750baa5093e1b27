"""flashinfer's paged attention (0.6.13), called below its wrappers.

The wrappers' plan() copies what we already have on the device and walks tensors in Python; the modules beneath take
plain arrays: `plan` reads CPU index arrays, writes a schedule to pinned memory and enqueues its copy to the device,
`run` launches the kernel. The pinned memory belongs to the caller here, so that it can rotate: a schedule must not be
overwritten while an earlier step's copy is still queued. All results come with their log-sum-exp in base 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from toka_engine.errors import ModelInvalidError
from toka_engine.model.attention.base import AttentionShape
from toka_engine.model.attention.paged_plan import QueryBatch
from toka_engine.model.compiled.modules import HEAD_DIMS, Kind, list_kinds, load_modules

NHD, HND = 0, 1
_FLOAT_WORKSPACE_BYTES = 256 << 20
_INT_WORKSPACE_BYTES = 8 << 20
_RING = 4
_USUAL_BATCHES = 4
"""Prefill and three depths of shared prefixes; deeper nesting allocates when it first comes."""
_NON_CAUSAL, _CAUSAL = 0, 1
_NO_WINDOW = -1
_SM90_MIN_ROWS = 48
"""Average query rows per request from which the Hopper kernel, which does not join the heads of a group, pays."""


@dataclass(frozen=True, slots=True)
class DevicePages:
    """A PageLists on the device, its pages laid side by side."""

    kv_indptr: torch.Tensor  # [n + 1] int32
    kv_indices: torch.Tensor  # [kv_indptr[-1]] int32
    last_page_lens: torch.Tensor  # [n] int32


class _Workspace:
    """Where schedules live: one device buffer, a ring of pinned ones with an event each."""

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        self.device_ints = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self._pinned = [torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(_RING)]
        self._events = [torch.cuda.Event() for _ in range(_RING)]
        self._stream = torch.cuda.current_stream(device)
        self._turn = 0

    def take_pinned(self) -> torch.Tensor:
        """A pinned buffer whose last copy is done."""
        self._turn = (self._turn + 1) % _RING
        self._events[self._turn].synchronize()
        return self._pinned[self._turn]

    def planned(self) -> None:
        """The copy from the buffer taken last is in the stream now."""
        self._events[self._turn].record(self._stream)


class PagedKernels:
    """flashinfer's kernels for one shape, for several query rows per request; on the current stream."""

    def __init__(self, shape: AttentionShape, page_size: int, layout: int) -> None:
        if shape.head_dim not in HEAD_DIMS:
            raise ModelInvalidError(f"head_dim={shape.head_dim} is not supported on a GPU ({HEAD_DIMS} are)")
        self._shape, self._page_size, self._layout = shape, page_size, layout
        modules = load_modules(list_kinds(torch.cuda.get_device_capability(shape.device)[0]), shape.head_dim)
        self._fa2: Any = modules[Kind.FA2]
        self._fa3: Any = modules.get(Kind.FA3)
        self._floats = torch.zeros(_FLOAT_WORKSPACE_BYTES, dtype=torch.uint8, device=shape.device)
        self._prefill_ints = [_Workspace(shape.device, _INT_WORKSPACE_BYTES) for _ in range(_USUAL_BATCHES)]

    @property
    def has_graph_queries(self) -> bool:
        """Whether plan_queries can be made for a graph: only the Hopper kernel's grid does not depend on its work."""
        return self._fa3 is not None

    def plan_queries(self, index: int, batch: QueryBatch, is_causal: bool, for_graph: bool = False) -> Any:
        """Schedule a batch of several query rows per request; `index` numbers the batches of one step.

        For a graph the schedule's layout depends on the numbers of rows and requests alone.
        """
        while len(self._prefill_ints) <= index:
            self._prefill_ints.append(_Workspace(self._shape.device, _INT_WORKSPACE_BYTES))
        shape, work = self._shape, self._prefill_ints[index]
        num_requests, num_rows = batch.pages.slots.size, int(batch.q_indptr[-1])
        is_fa3 = for_graph or (self._fa3 is not None and num_rows >= _SM90_MIN_ROWS * num_requests)
        arguments: list[Any] = [
            self._floats, work.device_ints, work.take_pinned(),
            torch.from_numpy(batch.q_indptr), torch.from_numpy(batch.pages.kv_indptr),
            torch.from_numpy(batch.pages.kv_lens), num_rows, num_requests,
            shape.num_heads, shape.num_kv_heads, self._page_size, for_graph, shape.head_dim, shape.head_dim,
            is_causal, _NO_WINDOW,
        ]  # fmt: skip
        if not is_fa3:
            arguments += [-1, False, 0]
        module = self._fa3 if is_fa3 else self._fa2
        plan = module.plan(*arguments)
        work.planned()
        return module, plan, work, _CAUSAL if is_causal else _NON_CAUSAL

    def run_queries(
        self,
        planned: Any,
        q: torch.Tensor,  # [rows, num_heads, head_dim]
        cache: torch.Tensor,  # [2, pages, ...]
        q_indptr: torch.Tensor,  # [n + 1] int32
        pages: DevicePages,
        out: torch.Tensor,  # [rows, num_heads, head_dim]
        lse: torch.Tensor | None,  # [rows, num_heads] fp32
    ) -> None:
        module, plan, work, mask = planned
        module.paged_run(
            self._floats, work.device_ints, plan, q, cache[0], cache[1],
            q_indptr, pages.kv_indptr, pages.kv_indices, pages.last_page_lens, out, lse,
            mask, self._layout, _NO_WINDOW, False,
            None, None, None, None, None, None,  # masks, slopes, multi-item arguments
            0.0, self._shape.scale, None, None, None, 1.0, 1.0, 0, 0,
        )  # fmt: skip
