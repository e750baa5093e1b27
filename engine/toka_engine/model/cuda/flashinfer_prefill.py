"""Prefill attention by flashinfer's paged kernels (0.6.13), called below its wrappers.

The wrappers' plan() copies what we already have on the device and walks tensors in Python; the modules below take plain
arrays: `plan` reads CPU index arrays, writes a schedule to pinned memory and enqueues its copy to the device, `run`
launches the kernel. The caller owns the pinned memory, so that it can rotate: a schedule must not be overwritten while
an earlier step's copy is still queued.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from toka_engine.errors import ModelInvalidError
from toka_engine.model.attention_backend import AttentionShape
from toka_engine.model.cuda.attention_plan import QueryBatch
from toka_engine.model.cuda.flashinfer_modules import HEAD_DIMS, Kind, list_kinds, load_modules
from toka_engine.model.in_flight import RING_SIZE

NHD, HND = 0, 1
_FLOAT_WORKSPACE_BYTES = 256 << 20
_INT_WORKSPACE_BYTES = 8 << 20
_CAUSAL = 1
_NO_WINDOW = -1
_SM90_MIN_ROWS = 48
"""Average query rows per request from which the Hopper kernel pays, which does not batch the heads of a KV head."""


@dataclass(frozen=True, slots=True)
class DevicePages:
    """A PageLists on the device, with its pages concatenated."""

    kv_indptr: torch.Tensor  # [n + 1] int32
    kv_indices: torch.Tensor  # [kv_indptr[-1]] int32
    last_page_lens: torch.Tensor  # [n] int32


class _Workspace:
    """Memory for schedules: one device buffer, and a ring of pinned ones with an event each."""

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        self.device_ints = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self._pinned = [torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(RING_SIZE)]
        self._events = [torch.cuda.Event() for _ in range(RING_SIZE)]
        self._stream = torch.cuda.current_stream(device)
        self._turn = 0

    def take_pinned(self) -> torch.Tensor:
        """Return the next pinned buffer, whose last copy is done."""
        self._turn = (self._turn + 1) % RING_SIZE
        self._events[self._turn].synchronize()
        return self._pinned[self._turn]

    def planned(self) -> None:
        """Record that the copy from the buffer taken last is enqueued."""
        self._events[self._turn].record(self._stream)


class FlashInferPrefill:
    """flashinfer's prefill kernels for one attention shape, launched on the current stream."""

    def __init__(self, shape: AttentionShape, page_size: int, layout: int) -> None:
        if shape.head_dim not in HEAD_DIMS:
            raise ModelInvalidError(f"head_dim={shape.head_dim} is not supported on a GPU ({HEAD_DIMS} are)")
        self._shape, self._page_size, self._layout = shape, page_size, layout
        modules = load_modules(list_kinds(torch.cuda.get_device_capability(shape.device)[0]), shape.head_dim)
        self._fa2: Any = modules[Kind.FA2]
        self._fa3: Any = modules.get(Kind.FA3)
        self._floats = torch.zeros(_FLOAT_WORKSPACE_BYTES, dtype=torch.uint8, device=shape.device)
        self._ints = _Workspace(shape.device, _INT_WORKSPACE_BYTES)

    def plan_queries(self, batch: QueryBatch) -> Any:
        """Schedule a batch of chunks with a causal mask."""
        shape, work = self._shape, self._ints
        num_requests, num_rows = batch.pages.slots.size, int(batch.q_indptr[-1])
        is_fa3 = self._fa3 is not None and num_rows >= _SM90_MIN_ROWS * num_requests
        arguments: list[Any] = [
            self._floats, work.device_ints, work.take_pinned(),
            torch.from_numpy(batch.q_indptr), torch.from_numpy(batch.pages.kv_indptr),
            torch.from_numpy(batch.pages.kv_lens), num_rows, num_requests,
            shape.num_heads, shape.num_kv_heads, self._page_size, False, shape.head_dim, shape.head_dim,
            True, _NO_WINDOW,
        ]  # fmt: skip
        if not is_fa3:
            arguments += [-1, False, 0]
        module = self._fa3 if is_fa3 else self._fa2
        plan = module.plan(*arguments)
        work.planned()
        return module, plan, work

    def run_queries(
        self,
        planned: Any,
        q: torch.Tensor,  # [rows, num_heads, head_dim]
        cache: torch.Tensor,  # [2, pages, ...]
        q_indptr: torch.Tensor,  # [n + 1] int32
        pages: DevicePages,
        out: torch.Tensor,  # [rows, num_heads, head_dim]
    ) -> None:
        module, plan, work = planned
        module.paged_run(
            self._floats, work.device_ints, plan, q, cache[0], cache[1],
            q_indptr, pages.kv_indptr, pages.kv_indices, pages.last_page_lens, out, None,
            _CAUSAL, self._layout, _NO_WINDOW, False,
            None, None, None, None, None, None,  # masks, slopes, multi-item arguments
            0.0, self._shape.scale, None, None, None, 1.0, 1.0, 0, 0,
        )  # fmt: skip
