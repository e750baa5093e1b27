"""Shared memory of one program, and the barriers in it.

Fresh memory holds NaN, and so does the place of a copy that is under way. It is an error to touch such a place, and to
write what a product that has begun still reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from triton.experimental.gluon import language as gl

from tests.unit.kernels.gluon_simulator.schedule import find_line, let_others_run, wait_until
from tests.unit.kernels.gluon_simulator.values import Value, poison, to_torch_type, to_type, to_value


class Race(Exception):
    """Shared memory is touched while something else that is under way writes or reads it."""


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all expected bytes have come."""

    def __init__(self, name: str, count: int) -> None:
        self._name, self._count = name, count
        self._missing, self._missing_bytes = count, 0
        self._num_ended = 0

    def arrive(self, count: int) -> None:
        if count > self._missing:
            raise RuntimeError(f"{self._name}: {count} more arrivals in a phase that lacks {self._missing}")
        self._missing -= count
        self._end_phase()

    def expect(self, num_bytes: int) -> None:
        """Also arrives, once, as in Gluon."""
        self._missing_bytes += num_bytes
        self.arrive(1)

    def come(self, num_bytes: int) -> None:
        self._missing_bytes -= num_bytes
        self._end_phase()

    def _end_phase(self) -> None:
        if self._missing == 0 and self._missing_bytes == 0:
            self._missing = self._count
            self._num_ended += 1

    def wait(self, phase: int) -> None:
        if phase not in (0, 1):
            raise ValueError(f"{self._name}: phase {phase}, which is neither 0 nor 1")
        wait_until(
            lambda: self._num_ended & 1 != phase,
            lambda: (
                f"phase {phase} of {self._name}, which has ended {self._num_ended} phases and lacks "
                f"{self._missing} of {self._count} arrivals and {self._missing_bytes} bytes"
            ),
        )


class Allocation:
    """A piece of shared memory, and what is under way in it."""

    def __init__(self, dtype: torch.dtype, shape: list[int]) -> None:
        self.line = find_line()
        self.data = torch.empty(shape, dtype=dtype)
        poison(self.data)
        self.uses: list[tuple[str, torch.Tensor, bool]] = []  # what is under way, where, and whether it writes
        self.barriers: dict[int, Barrier] = {}


class SharedMemory:
    """A view of an allocation, as kernels handle it."""

    def __init__(self, allocation: Allocation, data: torch.Tensor, layout: Any) -> None:
        self.allocation, self.data, self.layout = allocation, data, layout

    @property
    def dtype(self) -> gl.dtype:
        return to_type(self.data.dtype)

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def rank(self) -> int:
        return self.data.ndim

    @property
    def numel(self) -> int:
        return self.data.numel()

    def index(self, index: Any) -> SharedMemory:
        number = int(to_value(index))
        if not 0 <= number < self.data.shape[0]:
            raise IndexError(
                f"{number} is none of {self.data.shape[0]} of the shared memory made in {self.allocation.line}"
            )
        return SharedMemory(self.allocation, self.data[number], self.layout)

    def slice(self, start: int, length: int, dim: int = 0) -> SharedMemory:
        if not 0 <= start <= start + length <= self.data.shape[dim]:
            raise IndexError(f"{start}:{start + length} is not within dimension {dim} of {self.shape}")
        return SharedMemory(self.allocation, self.data.narrow(dim, start, length), self.layout)

    def permute(self, order: Any) -> SharedMemory:
        return SharedMemory(self.allocation, self.data.permute(tuple(order)), self.layout)

    def load(self, layout: Any = None) -> Value:
        let_others_run()
        self.check(writes=False)
        return Value(self.data.clone(), layout)

    def store(self, value: Value) -> None:
        if value.shape != self.shape or value.dtype != self.dtype:
            raise TypeError(f"a block {value.dtype}{value.shape} is stored to {self.dtype}{self.shape}")
        let_others_run()
        self.check(writes=True)
        self.data.copy_(value.data)

    # What follows is not for kernels.

    def check(self, writes: bool) -> None:
        for what, where, is_written in self.allocation.uses:
            if (writes or is_written) and overlap(self.data, where):
                verb = "written" if writes else "read"
                raise Race(f"{find_line()}: shared memory is {verb} during {what}")

    def begin_use(self, what: str, writes: bool) -> Callable[[], None]:
        """Something begins to write or read this; returns what is to be called at its end."""
        self.check(writes)
        if writes:
            poison(self.data)
        use = (what, self.data, writes)
        self.allocation.uses.append(use)

        def end() -> None:
            self.allocation.uses[:] = [each for each in self.allocation.uses if each is not use]

        return end

    def init_barrier(self, count: int) -> None:
        place = self.data.storage_offset()
        self.allocation.barriers[place] = Barrier(f"barrier {place} of those made in {self.allocation.line}", count)

    def get_barrier(self) -> Barrier:
        if self.data.numel() != 1:
            raise TypeError(f"one barrier is needed, not {self.shape}")
        place = self.data.storage_offset()
        if place not in self.allocation.barriers:
            raise RuntimeError(f"barrier {place} of those made in {self.allocation.line} was not initialised")
        return self.allocation.barriers[place]


def overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two views of one allocation share an element."""
    begin, end = _span(one)
    other_begin, other_end = _span(other)
    if end <= other_begin or other_end <= begin:
        return False
    if one.is_contiguous() and other.is_contiguous():
        return True
    marks = torch.zeros(max(end, other_end), dtype=torch.bool)
    marks.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
    return bool(marks.as_strided(other.shape, other.stride(), other.storage_offset()).any())


def _span(view: torch.Tensor) -> tuple[int, int]:
    begin = view.storage_offset()
    return begin, begin + 1 + sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))


def allocate_shared_memory(dtype: gl.dtype, shape: Any, layout: Any, value: Value | None = None) -> SharedMemory:
    allocation = Allocation(to_torch_type(dtype), list(shape))
    memory = SharedMemory(allocation, allocation.data, layout)
    if value is not None:
        memory.store(value)
    return memory
