"""Uploads small integer arrays to the GPU: packed into pinned memory, one asynchronous copy per upload.

The pinned buffers rotate, each guarded by an event, because the copy of an earlier step may still be queued. The device
buffer does not rotate: copies and the kernels that read it run in one stream, in order. So what `upload` returns is
valid until the next upload of the same Staging is enqueued.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from toka_engine.model.in_flight import RING_SIZE

_ALIGN = 4
"""Alignment of arrays in int32 words, for vector loads of 16 bytes and views as int64."""


class Staging:
    """A ring of pinned buffers in front of one device buffer of int32."""

    def __init__(self, device: torch.device, capacity: int = 1 << 15, depth: int = RING_SIZE) -> None:
        self._device = device
        # Asked for once: torch takes as long to look it up as to record the event.
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._depth = depth
        self._turn = 0
        self._allocate(capacity)

    def upload(self, *arrays: NDArray[np.int32]) -> list[torch.Tensor]:
        """Copy int32 arrays [n_i] to the device without waiting; the same sizes give the same addresses."""
        offsets = [0]
        for array in arrays:
            offsets.append(offsets[-1] + -(-array.size // _ALIGN) * _ALIGN)
        total = offsets[-1]
        if total > self._capacity:
            self._synchronize()
            self._allocate(2 * total)
        self._turn = (self._turn + 1) % self._depth
        event = self._events[self._turn]
        if event is not None:
            event.synchronize()
        pinned, words = self._pinned[self._turn], self._words[self._turn]
        for offset, array in zip(offsets, arrays, strict=False):
            words[offset : offset + array.size] = array
        if total:
            self._buffer[:total].copy_(pinned[:total], non_blocking=True)
        if event is not None:
            event.record(self._stream)
        return [self._buffer[offset : offset + array.size] for offset, array in zip(offsets, arrays, strict=False)]

    def _allocate(self, capacity: int) -> None:
        is_cuda = self._device.type == "cuda"
        self._capacity = capacity
        self._buffer = torch.zeros(capacity, dtype=torch.int32, device=self._device)
        self._pinned = [torch.zeros(capacity, dtype=torch.int32, pin_memory=is_cuda) for _ in range(self._depth)]
        self._words = [pinned.numpy() for pinned in self._pinned]
        self._events = [torch.cuda.Event() if is_cuda else None for _ in range(self._depth)]

    def _synchronize(self) -> None:
        for event in self._events:
            if event is not None:
                event.synchronize()
