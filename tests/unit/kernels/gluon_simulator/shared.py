"""Shared memory of one program, and the barriers in it.

Fresh memory holds NaN, and so does the place of a copy that is under way. Whatever touches memory must be sure that
all that touched it before is over (`order`).
"""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental.gluon import language as gl

from tests.unit.kernels.gluon_simulator.order import Clock, History, Touch, get_region, get_state, learn
from tests.unit.kernels.gluon_simulator.schedule import find_line, let_others_run, wait_until
from tests.unit.kernels.gluon_simulator.values import Value, poison, to_torch_type, to_type, to_value


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all expected bytes have come."""

    def __init__(self, name: str, count: int) -> None:
        self._name, self._count = name, count
        self._missing, self._missing_bytes = count, 0
        self._num_ended = 0
        self.num_copies = 0  # under way
        self._arrived: Clock = {}
        self._ended: Clock = {}

    @property
    def phase_number(self) -> int:
        """The number, from 1, of the phase that has not ended."""
        return self._num_ended + 1

    def arrive(self, count: int) -> None:
        if count > self._missing:
            raise RuntimeError(f"{self._name}: {count} more arrivals in a phase that lacks {self._missing}")
        self._missing -= count
        learn(self._arrived, get_state().clock)
        self._end_phase()

    def expect(self, num_bytes: int) -> None:
        """Expects bytes and arrives once, as in Gluon."""
        self._missing_bytes += num_bytes
        self.arrive(1)

    def end_copy(self, num_bytes: int) -> None:
        self.num_copies -= 1
        self._missing_bytes -= num_bytes
        self._end_phase()

    def _end_phase(self) -> None:
        if self._missing == 0 and self._missing_bytes == 0:
            if self.num_copies:
                raise RuntimeError(f"{self._name}: a phase ends while {self.num_copies} copies are under way")
            self._missing = self._count
            self._num_ended += 1
            learn(self._ended, self._arrived)
            self._ended[self] = self._num_ended

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
        learn(get_state().clock, self._ended)


class Allocation:
    """A piece of shared memory, and what touched it."""

    def __init__(self, dtype: torch.dtype, shape: list[int]) -> None:
        self.line = find_line()
        self.data = torch.empty(shape, dtype=dtype)
        poison(self.data)
        self.history = History()
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
        self.touch("a load", is_write=False)
        return Value(self.data.clone(), layout)

    def store(self, value: Value) -> None:
        if value.shape != self.shape or value.dtype != self.dtype:
            raise TypeError(f"a block {value.dtype}{value.shape} is stored to {self.dtype}{self.shape}")
        let_others_run()
        self.touch("a store", is_write=True)
        self.data.copy_(value.data)

    # What follows is not for kernels.

    def touch(self, what: str, is_write: bool, over: tuple[Any, int] | None = None) -> None:
        """`over`: for what is not done by threads, of whose clock and from which step on it is over."""
        state = get_state()
        who, number = over or ((state, "access"), state.step("access"))
        fences = state, "fence"
        fence = (fences, state.clock.get(fences, 0) + 1) if is_write and over is None else None
        region = get_region(self.data)
        self.allocation.history.add(Touch(region, what, find_line(), is_write, who, number, fence), over is not None)

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


def allocate_shared_memory(dtype: gl.dtype, shape: Any, layout: Any, value: Value | None = None) -> SharedMemory:
    allocation = Allocation(to_torch_type(dtype), list(shape))
    memory = SharedMemory(allocation, allocation.data, layout)
    if value is not None:
        memory.store(value)
    return memory
