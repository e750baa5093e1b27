"""Device memory that the GPUs of one host share between processes: allocated, exchanged, and checked by writing to it.

Memory comes from `cudaMalloc`, not from torch's allocator: a CUDA IPC handle covers a whole allocation, and torch's may
lie anywhere in a segment. Handles are opened with the own device current; a tensor that torch rebuilds from its own
handle lands in the other device's context, where Triton refuses its pointer.

The driver may report peer access and still lose writes, so `PeerMemory.verify` counts: a pattern is written to every
peer and read back there. NVLink multicast is never used, and nothing listens.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from cuda.bindings import runtime as cuda

from toka_engine.model.cuda.foreign_memory import view_memory
from toka_engine.model.kernels.peer_pattern import PATTERN_WORDS, pattern_start, write_pattern

Gather = Callable[[bytes], list[bytes]]
"""Gives every rank's bytes, in rank order, once all ranks have called it; so it is a barrier, too."""


class PeerMemoryError(Exception):
    """The GPUs of this host cannot read and write each other's memory; the message says why."""


class PeerMemory:
    """A region of `size` bytes on each rank's GPU, which every rank can read and write.

    Used as a context manager; all ranks must have ended their kernels on it before one leaves.
    """

    def __init__(self, rank: int, num_ranks: int, size: int, gather: Gather) -> None:
        """Allocate this rank's region on the current device and open the peers'. Raises PeerMemoryError on every rank
        if it fails on one.
        """
        self.rank, self.num_ranks, self.size = rank, num_ranks, size
        self._gather = gather
        self._own, self._opened = 0, dict[int, int]()
        handles = self._agree(self._allocate)
        self._agree(lambda: self._open(handles))

    @classmethod
    def open_verified(cls, rank: int, num_ranks: int, size: int, gather: Gather) -> Self:
        """Open regions that live as long as the process, and verify them. Raises PeerMemoryError on every rank."""
        memory = cls(rank, num_ranks, size, gather)
        try:
            memory.verify()
        except PeerMemoryError:
            memory.close()
            raise
        return memory

    @property
    def addresses(self) -> torch.Tensor:
        """[num_ranks] int64 on the GPU: the address of each rank's region, as this rank's GPU sees it."""
        every = [self._own if rank == self.rank else self._opened[rank] for rank in range(self.num_ranks)]
        return torch.tensor(every, dtype=torch.int64, device="cuda")

    def view(self, dtype: torch.dtype) -> torch.Tensor:
        """Return this rank's region as a flat tensor of `dtype`, which does not keep the memory alive.

        There is no view of a peer's region: torch would take the pointer for one of the other device.
        """
        return view_memory(self._own, self.size).view(dtype)

    def verify(self) -> None:
        """Write a pattern to every rank, and check what all ranks have written here. Raises PeerMemoryError."""
        write_pattern(self.addresses, self.rank)
        torch.cuda.synchronize()
        self._gather(b"")
        found = self.view(torch.int32)[: self.num_ranks * PATTERN_WORDS].view(self.num_ranks, PATTERN_WORDS).cpu()
        starts = torch.tensor([pattern_start(source, self.rank) for source in range(self.num_ranks)])
        expected = torch.arange(PATTERN_WORDS) + starts[:, None]
        lost = [source for source in range(self.num_ranks) if not torch.equal(found[source].long(), expected[source])]

        def report() -> bytes:
            if lost:
                raise PeerMemoryError(f"writes of the GPUs of ranks {lost} to the GPU of rank {self.rank} were lost")
            return b""

        self._agree(report)

    def close(self) -> None:
        """Close the peers' regions and free the own one."""
        for address in self._opened.values():
            cuda.cudaIpcCloseMemHandle(address)
        self._opened.clear()
        if self._own:
            cuda.cudaFree(self._own)
            self._own = 0

    def __enter__(self) -> PeerMemory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _allocate(self) -> bytes:
        self._own = int(_call("cudaMalloc", cuda.cudaMalloc(self.size)))
        return bytes(_call("cudaIpcGetMemHandle", cuda.cudaIpcGetMemHandle(self._own)).reserved)

    def _open(self, handles: list[bytes]) -> bytes:
        for peer, reserved in enumerate(handles):
            if peer != self.rank:
                handle = cuda.cudaIpcMemHandle_t()
                handle.reserved = reserved
                opened = cuda.cudaIpcOpenMemHandle(handle, cuda.cudaIpcMemLazyEnablePeerAccess)
                self._opened[peer] = int(_call("cudaIpcOpenMemHandle", opened))
        return b""

    def _agree(self, act: Callable[[], bytes]) -> list[bytes]:
        """Act, and give every rank's result; if one fails, all raise what the first that failed said."""
        try:
            result = b"+" + act()
        except PeerMemoryError as error:
            result = b"-" + str(error).encode()
        results = self._gather(result)
        failed = [answer[1:].decode() for answer in results if answer[:1] == b"-"]
        if failed:
            self.close()
            raise PeerMemoryError(failed[0])
        return [answer[1:] for answer in results]


def _call(name: str, answer: tuple[Any, Any]) -> Any:
    """Return the value of a driver's (status, value), whose types are its own; raises PeerMemoryError."""
    if int(answer[0]) != 0:
        raise PeerMemoryError(f"{name} failed: {answer[0].name}")
    return answer[1]
