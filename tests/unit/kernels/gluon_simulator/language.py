"""The module that kernels have as `gl`: functions on simulated values; types and layouts are Gluon's own."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from triton.experimental.gluon import language as real

from tests.unit.kernels.gluon_simulator.assembly import inline_asm_elementwise
from tests.unit.kernels.gluon_simulator.memory import atomic_add, load, store
from tests.unit.kernels.gluon_simulator.order import Race, get_state, learn
from tests.unit.kernels.gluon_simulator.schedule import get_task, wait_until
from tests.unit.kernels.gluon_simulator.shared import allocate_shared_memory
from tests.unit.kernels.gluon_simulator.values import Value, join_layouts, pair, to_torch_type, to_value


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


def reshape(value: Value, shape: Any) -> Value:
    return Value(value.data.reshape(list(shape)))


def split(value: Value) -> tuple[Value, Value]:
    """A block [..., 2] -> its halves, whose layout the compiler finds."""
    if value.data.shape[-1] != 2:
        raise TypeError(f"a block of shape {value.shape} has no two halves")
    return Value(value.data[..., 0].clone()), Value(value.data[..., 1].clone())


def join(left: Value, right: Value) -> Value:
    join_layouts(left, right)
    return Value(torch.stack((left.data, right.data), dim=-1))


def broadcast(left: Value, right: Value) -> tuple[Value, Value]:
    layout = join_layouts(left, right)
    return tuple(Value(each.clone(), layout) for each in torch.broadcast_tensors(left.data, right.data))


def fma(x: Any, y: Any, z: Any) -> Value:
    return to_value(x) * y + z


def cdiv(x: Any, div: Any) -> Any:
    return (x + div - 1) // div


def program_id(axis: int) -> Value:
    return to_value(get_state().program[axis])


def num_programs(axis: int) -> Value:
    return to_value(get_state().grid[axis])


# ---------------------------------------------------------------- partitions


def warp_specialize(functions_and_args: Any, worker_num_warps: Any, worker_num_regs: Any) -> Any:
    """The first partition in this task, the others in tasks of their own, until all have ended."""
    if not len(functions_and_args) - 1 == len(worker_num_warps) == len(worker_num_regs):
        raise ValueError("each partition but the first needs a number of warps and of registers")
    task, state = get_task(), get_state()
    thread_barrier()
    workers = []
    for number, (function, arguments) in enumerate(functions_and_args[1:], 1):
        name = f"{task.name}, partition {number} ({function.__name__})"
        worker = task.schedule.add(name, partial(run_partition, function, arguments))
        worker.state = state.make_partition()
        workers.append(worker)
    function, arguments = functions_and_args[0]
    result = run_partition(function, arguments)
    wait_until(lambda: all(worker.has_ended for worker in workers), lambda: "the other partitions")
    thread_barrier()
    for worker in workers:
        learn(state.clock, worker.state.clock)
    return result


def run_partition(function: Any, arguments: Any) -> Any:
    """Runs a partition to its end, at which all its products must have been waited for."""
    result = function(*arguments)
    for product in get_state().products:
        raise Race(f"a task may end before a product that began in {product.line}")
    thread_barrier()
    return result


def thread_barrier() -> None:
    """One thread of the task makes known to other tasks what all of its threads have stored so far."""
    get_state().step("barrier")


def do_nothing(*arguments: Any, **options: Any) -> None:
    pass


def static_assert(condition: Any, message: str = "") -> None:
    if not condition:
        raise AssertionError(message)


def _return_first(value: Any, *more: Any) -> Any:
    return value


FUNCTIONS: dict[str, Any] = {
    "arange": arange, "full": full, "zeros": zeros, "where": where, "convert_layout": convert_layout,
    "set_auto_layout": convert_layout, "reshape": reshape, "split": split, "join": join, "broadcast": broadcast,
    "inline_asm_elementwise": inline_asm_elementwise,
    "fma": fma, "cdiv": cdiv, "program_id": program_id, "num_programs": num_programs,
    "load": load, "store": store, "atomic_add": atomic_add, "warp_specialize": warp_specialize,
    "allocate_shared_memory": allocate_shared_memory, "thread_barrier": thread_barrier, "static_range": range,
    "static_assert": static_assert, "static_print": do_nothing, "device_print": do_nothing, "assume": do_nothing,
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
        if name in FUNCTIONS:
            return FUNCTIONS[name]
        there = getattr(real, name)
        if isinstance(there, real.dtype) or (isinstance(there, type) and name.endswith("Layout")):
            return there
        raise NotImplementedError(f"gl.{name} is not simulated")
