"""What kernels have as `gl`: functions on simulated values; types and layouts are Gluon's own."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from triton.experimental.gluon import language as real

from tests.unit.kernels.gluon_simulator.schedule import get_task, let_others_run, wait_until
from tests.unit.kernels.gluon_simulator.shared import allocate_shared_memory
from tests.unit.kernels.gluon_simulator.values import (
    Pointer,
    Value,
    join_layouts,
    pair,
    poison,
    to_torch_type,
    to_value,
)


class OutOfBounds(Exception):
    """A load or store of a place that the tensor does not have."""


def _elementwise(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Value]:
    def apply(x: Any) -> Value:
        value = to_value(x)
        return Value(function(value.data), value.layout)

    return apply


def _of_two(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[..., Value]:
    def apply(x: Any, y: Any, **options: Any) -> Value:
        left, right, layout = pair(x, y)
        return Value(function(left, right), layout)

    return apply


def _reduction(function: Callable[[torch.Tensor, int], torch.Tensor]) -> Callable[..., Value]:
    def apply(input: Value, axis: int | None = None, keep_dims: bool = False) -> Value:
        data, layout = input.data, input.layout
        if axis is None:
            found = function(data.flatten(), 0)
            return Value(found.view((1,) * data.ndim) if keep_dims else found, layout)
        found = function(data, axis)
        if keep_dims:
            return Value(found.unsqueeze(axis), layout)
        return Value(found, None if layout is None or data.ndim == 1 else real.SliceLayout(axis, layout))

    return apply


def _sum(data: torch.Tensor, axis: int) -> torch.Tensor:
    is_small = not data.dtype.is_floating_point and data.dtype.itemsize < 4
    return data.sum(axis, dtype=torch.int32 if is_small else data.dtype)


def arange(start: int, end: int, layout: Any = None) -> Value:
    length = end - start
    if length <= 0 or length & (length - 1):
        raise ValueError(f"a range of {length}, which is no power of 2")
    return Value(torch.arange(start, end, dtype=torch.int32), layout)


def full(shape: Any, value: Any, dtype: real.dtype, layout: Any = None) -> Value:
    number = value._get_scalar() if isinstance(value, Value) else value
    return Value(torch.full(list(shape), number, dtype=to_torch_type(dtype)), layout)


def zeros(shape: Any, dtype: real.dtype, layout: Any = None) -> Value:
    return full(shape, 0, dtype, layout)


def where(condition: Any, x: Any, y: Any) -> Value:
    left, right, layout = pair(x, y)
    condition = to_value(condition)
    layout = join_layouts(condition, *(Value(each, layout) for each in (left, right) if each.ndim))
    return Value(torch.where(condition.data, left, right), layout)


def convert_layout(value: Value, layout: Any, assert_trivial: bool = False) -> Value:
    return Value(value.data, layout)


def fma(x: Any, y: Any, z: Any) -> Value:
    return to_value(x) * y + z


def cdiv(x: Any, div: Any) -> Any:
    return (x + div - 1) // div


def program_id(axis: int) -> Value:
    return to_value(get_task().state.program[axis])


def num_programs(axis: int) -> Value:
    return to_value(get_task().state.grid[axis])


# ---------------------------------------------------------------- memory of all programs


def _find(pointer: Pointer, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The places, and of which of them the mask says that they are meant; these are within bounds."""
    at = pointer.at.data
    is_meant = torch.ones_like(at, dtype=torch.bool)
    if mask is not None:
        mask = to_value(mask)
        join_layouts(pointer.at, mask)
        is_meant = mask.data.expand(at.shape)
    size = pointer.tensor.numel()
    is_outside = is_meant & ((at < 0) | (at >= size))
    if bool(is_outside.any()):
        which = at[is_outside]
        raise OutOfBounds(f"{which.numel()} places outside of {size} elements, the first {int(which.flatten()[0])}")
    return at, is_meant


def _gather(pointer: Pointer, at: torch.Tensor) -> torch.Tensor:
    """What is there now: an index without dimensions would give a view."""
    return pointer.tensor[at].clone()


def load(
    pointer: Pointer, mask: Any = None, other: Any = None, cache_modifier: str = "", eviction_policy: str = "",
    volatile: bool = False,
) -> Value:  # fmt: skip
    """What is masked and has no other value is poison."""
    if volatile:
        let_others_run()
    at, is_meant = _find(pointer, mask)
    if mask is None:
        return Value(_gather(pointer, at), pointer.at.layout)
    found = torch.empty(at.shape, dtype=pointer.tensor.dtype)
    if other is None:
        poison(found)
    else:
        other = to_value(other)
        join_layouts(pointer.at, other)
        found.copy_(other.data)
    return Value(torch.where(is_meant, _gather(pointer, torch.where(is_meant, at, 0)), found), pointer.at.layout)


def store(pointer: Pointer, value: Any, mask: Any = None, cache_modifier: str = "", eviction_policy: str = "") -> None:
    at, is_meant = _find(pointer, mask)
    value = to_value(value)
    join_layouts(pointer.at, value)
    data = value.data.to(pointer.tensor.dtype).expand(at.shape)
    pointer.tensor[at[is_meant]] = data[is_meant]


def atomic_add(pointer: Pointer, val: Any, mask: Any = None, sem: str | None = None, scope: str | None = None) -> Value:
    """Others may run just before it and just after."""
    let_others_run()
    at, is_meant = _find(pointer, mask)
    found = _gather(pointer, torch.where(is_meant, at, 0))
    added = to_value(val).data.to(found.dtype).expand(at.shape)
    pointer.tensor.index_put_((at[is_meant],), added[is_meant], accumulate=True)
    let_others_run()
    return Value(found, pointer.at.layout)


# ---------------------------------------------------------------- partitions


def warp_specialize(functions_and_args: Any, worker_num_warps: Any, worker_num_regs: Any) -> Any:
    """The first partition in this task, the others in tasks of their own, until all have ended."""
    if not len(functions_and_args) - 1 == len(worker_num_warps) == len(worker_num_regs):
        raise ValueError("each partition but the first needs a number of warps and of registers")
    task = get_task()
    workers = []
    for number, (function, arguments) in enumerate(functions_and_args[1:], 1):
        name = f"{task.name}, partition {number} ({function.__name__})"
        worker = task.schedule.add(name, lambda function=function, arguments=arguments: function(*arguments))
        worker.state = task.state.copy()
        workers.append(worker)
    let_others_run()
    function, arguments = functions_and_args[0]
    result = function(*arguments)
    wait_until(lambda: all(worker.has_ended for worker in workers), lambda: "the other partitions")
    return result


def _do_nothing(*arguments: Any, **options: Any) -> None:
    pass


def static_assert(condition: Any, message: str = "") -> None:
    if not condition:
        raise AssertionError(message)


def _return_first(value: Any, *more: Any) -> Any:
    return value


_FUNCTIONS: dict[str, Any] = {
    "arange": arange, "full": full, "zeros": zeros, "where": where, "convert_layout": convert_layout,
    "set_auto_layout": convert_layout, "fma": fma, "cdiv": cdiv, "program_id": program_id, "num_programs": num_programs,
    "load": load, "store": store, "atomic_add": atomic_add, "warp_specialize": warp_specialize,
    "allocate_shared_memory": allocate_shared_memory, "thread_barrier": _do_nothing, "static_range": range,
    "static_assert": static_assert, "static_print": _do_nothing, "device_print": _do_nothing, "assume": _do_nothing,
    "device_assert": static_assert, "to_tensor": to_value, "multiple_of": _return_first,
    "max_contiguous": _return_first, "max_constancy": _return_first, "constexpr": _return_first,
    "expand_dims": lambda value, axis: value.expand_dims(axis), "cast": lambda value, dtype: value.to(dtype),
    "maximum": _of_two(torch.maximum), "minimum": _of_two(torch.minimum), "fdiv": _of_two(operator.truediv),
    "max": _reduction(lambda data, axis: data.amax(axis)), "min": _reduction(lambda data, axis: data.amin(axis)),
    "sum": _reduction(_sum), "exp": _elementwise(torch.exp), "exp2": _elementwise(torch.exp2),
    "log": _elementwise(torch.log), "log2": _elementwise(torch.log2), "sqrt": _elementwise(torch.sqrt),
    "rsqrt": _elementwise(torch.rsqrt), "abs": _elementwise(torch.abs), "floor": _elementwise(torch.floor),
    "ceil": _elementwise(torch.ceil),
}  # fmt: skip


class Language:
    """Stands for the module; what it lacks, a kernel may not use here."""

    def __getattr__(self, name: str) -> Any:
        if name in _FUNCTIONS:
            return _FUNCTIONS[name]
        there = getattr(real, name)
        if isinstance(there, real.dtype) or (isinstance(there, type) and name.endswith("Layout")):
            return there
        raise NotImplementedError(f"gl.{name} is not simulated")
