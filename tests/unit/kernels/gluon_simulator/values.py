"""Values of the kernel language on torch tensors: blocks with their layouts, and scalars.

Arithmetic has the types that Triton gives it: of two values the wider type, whether or not one is a scalar; a Python
number takes the value's type. Integer division is that of C. Layouts are kept where they are known, and two that differ
may not meet, as in the compiler.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from triton.experimental.gluon import language as gl

_TYPES = {
    torch.bool: gl.int1, torch.int8: gl.int8, torch.uint8: gl.uint8, torch.int16: gl.int16, torch.int32: gl.int32,
    torch.int64: gl.int64, torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32,
    torch.float64: gl.float64, torch.float8_e4m3fn: gl.float8e4nv, torch.float8_e5m2: gl.float8e5,
}  # fmt: skip
_TORCH_TYPES = {str(there): here for here, there in _TYPES.items()}


def to_torch_type(dtype: gl.dtype) -> torch.dtype:
    return _TORCH_TYPES[str(dtype)]


def to_type(dtype: torch.dtype) -> gl.dtype:
    return _TYPES[dtype]


def poison(tensor: torch.Tensor) -> None:
    """Fill with what nobody meant: NaN, or the greatest integer."""
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    else:
        tensor.fill_(True if tensor.dtype is torch.bool else torch.iinfo(tensor.dtype).max)


class Value:
    """A scalar or a block. Never changed."""

    __slots__ = ("data", "layout")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, data: torch.Tensor, layout: Any = None) -> None:
        self.data, self.layout = data, layout if data.ndim else None
        if self.layout is not None and getattr(layout, "rank", data.ndim) != data.ndim:
            raise TypeError(f"a block of shape {list(data.shape)} has a layout of another rank: {layout}")

    @property
    def dtype(self) -> gl.dtype:
        return to_type(self.data.dtype)

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def type(self) -> Value:
        """It has the layout, too."""
        return self

    def to(self, dtype: gl.dtype, bitcast: bool = False) -> Value:
        there = to_torch_type(dtype)
        return Value(self.data.view(there) if bitcast else self.data.to(there), self.layout)

    def expand_dims(self, axis: int) -> Value:
        return Value(self.data.unsqueeze(axis), expand_layout(self.layout, axis % (self.data.ndim + 1)))

    def __getitem__(self, index: Any) -> Value:
        value = self
        for axis, each in enumerate(index if isinstance(index, tuple) else (index,)):
            if each is None:
                value = value.expand_dims(axis)
            elif each != slice(None):
                raise TypeError(f"a block is indexed by ':' and None alone, not by {each}")
        return value

    def __bool__(self) -> bool:
        return bool(self._get_scalar())

    def __index__(self) -> int:
        return int(self._get_scalar())

    def __float__(self) -> float:
        return float(self._get_scalar())

    def _get_scalar(self) -> Any:
        if self.data.ndim:
            raise TypeError(f"a block of shape {self.shape} where a scalar is needed")
        return self.data.item()

    def __invert__(self) -> Value:
        return Value(~self.data, self.layout)

    def __neg__(self) -> Value:
        return Value(-self.data, self.layout)

    def __repr__(self) -> str:
        return f"Value({self.data}, {self.layout})"


def expand_layout(layout: Any, axis: int) -> Any:
    if layout is None:
        return None
    if not isinstance(layout, gl.SliceLayout) or layout.dim != axis:
        raise TypeError(f"a dimension {axis} is not what this layout lacks: {layout}")
    return layout.parent


def join_layouts(*values: Value) -> Any:
    """That of all blocks among the values."""
    known = [value.layout for value in values if value.layout is not None]
    if any(layout != known[0] for layout in known):
        raise TypeError("layouts differ: " + ", ".join(map(str, known)))
    return known[0] if known else None


def to_value(number: Any) -> Value:
    """A Python number as the kernel language has it: int32 unless it is too large, float32."""
    if isinstance(number, Value):
        return number
    if isinstance(number, bool):
        return Value(torch.tensor(number))
    if isinstance(number, int):
        return Value(torch.tensor(number, dtype=torch.int32 if -(2**31) <= number < 2**31 else torch.int64))
    if isinstance(number, float):
        return Value(torch.tensor(number, dtype=torch.float32))
    raise TypeError(f"not a number: {number!r}")


def _take_type(number: Any, value: Value) -> Value:
    """A Python number in the type that an operation with the value has."""
    if isinstance(number, Value):
        return number
    dtype = value.data.dtype
    if isinstance(number, float) and not dtype.is_floating_point:
        dtype = torch.float32
    elif dtype is torch.bool and not isinstance(number, bool):
        dtype = torch.int32
    return Value(torch.tensor(number, dtype=dtype))


def pair(left: Any, right: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Both in one type, and their layout."""
    if not isinstance(left, Value) and not isinstance(right, Value):
        left, right = to_value(left), to_value(right)
    elif not isinstance(left, Value):
        left = _take_type(left, right)
    elif not isinstance(right, Value):
        right = _take_type(right, left)
    layout = join_layouts(left, right)
    if left.data.ndim and right.data.ndim and left.data.ndim != right.data.ndim:
        raise TypeError(f"shapes differ in rank: {left.shape} and {right.shape}")
    dtype = torch.promote_types(left.data.dtype, right.data.dtype)
    return left.data.to(dtype), right.data.to(dtype), layout


def _divide(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.div(left, right, rounding_mode="trunc")


def _divide_floats(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if not left.dtype.is_floating_point:
        left, right = left.float(), right.float()
    return left / right


_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "truediv": _divide_floats, "floordiv": _divide,
    "mod": torch.fmod, "and": operator.and_, "or": operator.or_, "xor": operator.xor, "lshift": operator.lshift,
    "rshift": operator.rshift, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "eq": operator.eq, "ne": operator.ne,
}  # fmt: skip


def _define(name: str, operation: Callable[[Any, Any], Any]) -> None:
    def apply(self: Value, other: Any) -> Any:
        if not isinstance(other, (Value, int, float)):
            return NotImplemented
        left, right, layout = pair(self, other)
        return Value(operation(left, right), layout)

    def apply_reflected(self: Value, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        left, right, layout = pair(other, self)
        return Value(operation(left, right), layout)

    setattr(Value, f"__{name}__", apply)
    if name not in ("lt", "le", "gt", "ge", "eq", "ne"):
        setattr(Value, f"__r{name}__", apply_reflected)


for _name, _operation in _OPERATIONS.items():
    _define(_name, _operation)


def count_up(*bounds: Any) -> Iterator[Value]:
    """`range` of a kernel: its numbers are values."""
    for number in range(*map(operator.index, bounds)):
        yield to_value(number)
