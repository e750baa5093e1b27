"""Memory that all programs share: pointers, loads, stores and atomic additions.

Every place that is not masked must be one of the tensor's. What a task has stored is known to another one, if a barrier
of its threads and an atomic addition follow, and the other task adds to the same place behind it (`order`).
"""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental.gluon import language as gl

from tests.unit.kernels.gluon_simulator.order import Clock, Race, State, get_state, learn
from tests.unit.kernels.gluon_simulator.schedule import find_line, let_others_run
from tests.unit.kernels.gluon_simulator.values import Value, join_layouts, poison, to_type, to_value


class OutOfBounds(Exception):
    """A load or store of a place that the tensor does not have."""


class Memory:
    """A launch's view of a tensor, from its first element to its last, and who has stored what in this launch."""

    def __init__(self, tensor: torch.Tensor) -> None:
        reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.data = tensor.as_strided((reach if tensor.numel() else 0,), (1,))
        self.left: dict[int, Clock] = {}
        """By place, what tasks knew when they added to it."""
        self._stores: list[tuple[State, int, str]] = []
        self._last_store: torch.Tensor | None = None  # of each place, its number in the list, or -1

    def add_store(self, places: torch.Tensor) -> None:
        """It is over with the next barrier of the task's threads."""
        if self._last_store is None:
            self._last_store = torch.full(self.data.shape, -1, dtype=torch.int32)
        state = get_state()
        self._last_store[places] = len(self._stores)
        self._stores.append((state, state.clock.get((state, "barrier"), 0) + 1, find_line()))

    def check(self, places: torch.Tensor, what: str) -> None:
        """Raises Race, unless all stores to these places by others are known to be over."""
        if self._last_store is None:
            return
        state = get_state()
        for number in self._last_store[places].unique().tolist():
            if number >= 0:
                who, step, line = self._stores[number]
                if who is not state and state.clock.get((who, "barrier"), 0) < step:
                    raise Race(f"{what} in {find_line()} may come before the end of a store in {line}")


class Pointer:
    """A scalar or a block of places in memory, counted in elements from where the tensor begins."""

    __slots__ = ("at", "memory")

    def __init__(self, memory: Memory, at: Value) -> None:
        self.memory, self.at = memory, at

    @classmethod
    def to(cls, tensor: torch.Tensor) -> Pointer:
        return cls(Memory(tensor), Value(torch.zeros((), dtype=torch.int64)))

    @property
    def dtype(self) -> gl.pointer_type:
        return gl.pointer_type(to_type(self.memory.data.dtype))

    @property
    def shape(self) -> list[int]:
        return self.at.shape

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.at + offset)

    __radd__ = __add__

    def __sub__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.at - offset)

    def __getitem__(self, index: Any) -> Pointer:
        return Pointer(self.memory, self.at[index])


def _find(pointer: Pointer, mask: Any) -> torch.Tensor:
    """Which places are meant, of the pointer's shape; these are within bounds."""
    at, size = pointer.at.data, pointer.memory.data.numel()
    is_meant = torch.ones_like(at, dtype=torch.bool)
    if mask is not None:
        mask = to_value(mask)
        join_layouts(pointer.at, mask)
        is_meant = mask.data.expand(at.shape)
    is_outside = is_meant & ((at < 0) | (at >= size))
    if bool(is_outside.any()):
        which = at[is_outside]
        raise OutOfBounds(f"{which.numel()} places outside of {size} elements, the first {int(which.flatten()[0])}")
    return is_meant


def load(
    pointer: Pointer, mask: Any = None, other: Any = None, cache_modifier: str = "", eviction_policy: str = "",
    volatile: bool = False,
) -> Value:  # fmt: skip
    """An element that is masked and has no other value is poison."""
    if volatile:
        let_others_run()
    is_meant = _find(pointer, mask)
    found = torch.empty(is_meant.shape, dtype=pointer.memory.data.dtype)
    if other is None:
        poison(found)
    else:
        other = to_value(other)
        join_layouts(pointer.at, other)
        found.copy_(other.data)
    places = pointer.at.data[is_meant]
    pointer.memory.check(places, "a load")
    found[is_meant] = pointer.memory.data[places]
    return Value(found, pointer.at.layout)


def store(pointer: Pointer, value: Any, mask: Any = None, cache_modifier: str = "", eviction_policy: str = "") -> None:
    is_meant, value = _find(pointer, mask), to_value(value)
    join_layouts(pointer.at, value)
    places, memory = pointer.at.data[is_meant], pointer.memory
    memory.check(places, "a store")
    memory.data[places] = value.data.to(memory.data.dtype).expand(is_meant.shape)[is_meant]
    memory.add_store(places)


def atomic_add(pointer: Pointer, val: Any, mask: Any = None, sem: str | None = None, scope: str | None = None) -> Value:
    """Others may run just before it and just after."""
    let_others_run()
    is_meant, memory = _find(pointer, mask), pointer.memory
    places = pointer.at.data[is_meant]
    found = torch.zeros(is_meant.shape, dtype=memory.data.dtype)
    found[is_meant] = memory.data[places]
    added = to_value(val).data.to(found.dtype).expand(is_meant.shape)[is_meant]
    memory.data.index_put_((places,), added, accumulate=True)
    if scope != "cta":
        clock = get_state().clock
        for place in places.tolist():
            left = memory.left.setdefault(place, {})
            if sem in (None, "acq_rel", "acquire"):
                learn(clock, left)
            if sem in (None, "acq_rel", "release"):
                learn(left, clock)
    let_others_run()
    return Value(found, pointer.at.layout)
