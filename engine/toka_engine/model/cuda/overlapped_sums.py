"""Async tensor parallelism: ranks exchange their parts of a sum while the GEMM that makes them still runs.

A GEMM whose outputs are summed over ranks is launched for a chunk of rows at a time. As soon as a chunk is there, a
side stream copies it into the peers' boxes and then, behind it, the turn's number into their flags: the GPU's copy
engines move both, so no processor is taken from the GEMM of the next chunk. The norm waits for each chunk's flags and
adds it up. The wait is one of the stream, not of a kernel, and like the kernels of the other sums it has no time-out:
that a peer is dead is seen by the supervisor.

Boxes have two turns. A peer writes turn t + 2 only after it has received all chunks of turn t + 1, and this rank sent
those after it had read all of turn t: a sum begins when the one before it has ended, on every rank. A rank's parts are
freed behind an event that follows their last copy.

Turns are counted on the host, so this is for steps launched kernel by kernel; captures of CUDA graphs take the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from cuda.bindings import driver, runtime

from toka_engine.model.kernels.chunk_sum import MAX_CHUNKS, Boxes, sum_add_rms_norm
from toka_engine.model.ops import BegunSum, Gemm

_CHUNK_ROWS = 1024
"""Rows with which a GEMM of common widths fills a GPU. Chunks have fewer only where there are not two of these."""
_TILE_ROWS = 256
"""A multiple of the rows that tiles of GEMMs have."""
_TURN_MASK = 0xFFFFFFFF
"""Turns are words, and waits compare them modulo 2 ** 32."""


def cut_rows(num_rows: int) -> list[slice]:
    """Cut rows into chunks of about the same size, two to MAX_CHUNKS of them; into one if they are a tile at most."""
    count = min(MAX_CHUNKS, max(2, num_rows // _CHUNK_ROWS))
    size = -(-num_rows // (count * _TILE_ROWS)) * _TILE_ROWS
    return [slice(begin, min(begin + size, num_rows)) for begin in range(0, num_rows, size)]


class Waitable(Protocol):
    """An event that the current stream can wait for."""

    def wait(self) -> None: ...


class CopyQueue(Protocol):
    """Copies to the peers' memory, done in order beside the current stream, and waits for those of the peers."""

    def is_usable(self) -> bool:
        """Whether what the current stream is given now is done once, now: it is not captured."""
        ...

    def set_turn(self, turn: int) -> None:
        """Have the copies from now on put `turn` into flags."""
        ...

    def follow(self, index: int) -> None:
        """Have the copies from now on come after what the current stream has been given. `index`: of the chunk."""
        ...

    def copy(self, address: int, rows: torch.Tensor) -> None:
        """Copy contiguous rows to an address."""
        ...

    def put_turn(self, address: int) -> None:
        """Copy the turn into the flag at an address."""
        ...

    def mark(self) -> Waitable:
        """Return what is there when all copies up to here are done."""
        ...

    def wait(self, address: int, turn: int) -> None:
        """Have the current stream wait until the flag at an address of the own memory has come to `turn`."""
        ...


class StreamQueue:
    """A CopyQueue of the current GPU: a stream of its own, whose copies its copy engines do."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._followed = [torch.cuda.Event() for _ in range(MAX_CHUNKS)]
        self._turn = torch.zeros(1, dtype=torch.int32, device="cuda")
        torch.cuda.synchronize()

    def is_usable(self) -> bool:
        """See CopyQueue."""
        return not torch.cuda.is_current_stream_capturing()

    def set_turn(self, turn: int) -> None:
        """See CopyQueue."""
        _check(driver.cuStreamWriteValue32(self._stream.cuda_stream, self._turn.data_ptr(), turn, 0))

    def follow(self, index: int) -> None:
        """See CopyQueue. An event may be recorded again when its last wait has been enqueued."""
        self._followed[index].record()
        self._stream.wait_event(self._followed[index])

    def copy(self, address: int, rows: torch.Tensor) -> None:
        """See CopyQueue."""
        self._copy(address, rows.data_ptr(), rows.nbytes)

    def put_turn(self, address: int) -> None:
        """See CopyQueue."""
        self._copy(address, self._turn.data_ptr(), self._turn.nbytes)

    def mark(self) -> Waitable:
        """See CopyQueue."""
        done = torch.cuda.Event()
        done.record(self._stream)
        return done

    def wait(self, address: int, turn: int) -> None:
        """See CopyQueue."""
        reached = int(driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ)
        _check(driver.cuStreamWaitValue32(torch.cuda.current_stream().cuda_stream, address, turn, reached))

    def _copy(self, target: int, source: int, size: int) -> None:
        kind = runtime.cudaMemcpyKind.cudaMemcpyDefault
        _check(runtime.cudaMemcpyAsync(target, source, size, kind, self._stream.cuda_stream))


class OverlappedSums:
    """Makes the sums of one rank. All ranks begin and end the same sums in the same order, one at a time."""

    def __init__(self, boxes: Boxes, threshold: int, queue: CopyQueue) -> None:
        """Sums of fewer than `threshold` rows are left to the kernel. The boxes' flags are zeros."""
        self.boxes, self.queue = boxes, queue
        self._threshold = threshold
        self.peers = [peer for peer in range(boxes.num_ranks) if peer != boxes.rank]
        self._turn = 0

    def begin(self, x: torch.Tensor, gemm: Gemm) -> BegunSum | None:
        """See ops.Ops.begin_sum."""
        num_rows, boxes, queue = x.shape[0], self.boxes, self.queue
        if num_rows < self._threshold or not queue.is_usable():
            return None
        self._turn = turn = (self._turn + 1) & _TURN_MASK
        queue.set_turn(turn)
        chunks, parts = cut_rows(num_rows), []
        for index, chunk in enumerate(chunks):
            part = gemm(x[chunk])
            queue.follow(index)
            for peer in self.peers:
                queue.copy(boxes.find_box(peer, boxes.rank, turn, chunk.start), part)
                queue.put_turn(boxes.find_flag(peer, boxes.rank, index))
            parts.append(part)
        return _Sum(self, turn, chunks, parts, queue.mark())


@dataclass(slots=True)
class _Sum(BegunSum):
    sums: OverlappedSums
    turn: int
    chunks: list[slice]
    parts: list[torch.Tensor]
    sent: Waitable
    """Is there when the parts have been copied."""

    def add_rms_norm(self, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See BegunSum."""
        boxes, out = self.sums.boxes, torch.empty_like(residual)
        for index, (chunk, part) in enumerate(zip(self.chunks, self.parts, strict=True)):
            for peer in self.sums.peers:
                self.sums.queue.wait(boxes.find_flag(boxes.rank, peer, index), self.turn)
            sum_add_rms_norm(part, residual[chunk], weight, eps, boxes, self.turn, chunk.start, out[chunk])
        self.sent.wait()
        self.parts.clear()
        return out


def _check(answer: tuple[Any, ...]) -> None:
    """Raise RuntimeError for the (status, ...) of a call that failed."""
    if int(answer[0]) != 0:
        raise RuntimeError(f"the exchange of a sum failed: {answer[0].name}")
