"""The names that kernels import from Gluon's `nvidia.hopper`: barriers, copies by TMA, and products of warpgroups.

A copy comes at some time after it was asked for. A product reads its operands in shared memory when it is waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier as real_mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tests.unit.kernels.gluon_simulator.order import get_state
from tests.unit.kernels.gluon_simulator.schedule import find_line, get_task, let_others_run
from tests.unit.kernels.gluon_simulator.shared import SharedMemory
from tests.unit.kernels.gluon_simulator.values import Value, poison, to_type, to_value


class mbarrier:
    MBarrierLayout = real_mbarrier.MBarrierLayout

    @staticmethod
    def init(barrier: SharedMemory, count: int) -> None:
        barrier.init_barrier(count)

    @staticmethod
    def invalidate(barrier: SharedMemory) -> None:
        barrier.get_barrier()
        barrier.allocation.barriers.pop(barrier.data.storage_offset())

    @staticmethod
    def expect(barrier: SharedMemory, bytes: Any, pred: Any = True) -> None:
        let_others_run()
        if pred:
            barrier.get_barrier().expect(int(bytes))

    @staticmethod
    def arrive(barrier: SharedMemory, *, count: int = 1, pred: Any = True) -> None:
        let_others_run()
        if pred:
            barrier.get_barrier().arrive(count)

    @staticmethod
    def wait(barrier: SharedMemory, phase: Any, pred: Any = True, deps: Any = ()) -> None:
        if pred:
            barrier.get_barrier().wait(int(to_value(phase)))


class Descriptor:
    """A host's TensorDescriptor, as kernels see it."""

    def __init__(self, host: TensorDescriptor) -> None:
        self.block_shape, self.shape, self.layout = list(host.block_shape), list(host.shape), host.layout
        self.dtype = to_type(host.base.dtype)
        self.tensor = host.base.as_strided(host.shape, host.strides)
        self.outside = 0.0 if host.padding == "zero" else float("nan")

    def read(self, begin: list[int]) -> torch.Tensor:
        """The block that begins there, with zeros (or NaN) outside of the tensor."""
        block = torch.full(self.block_shape, self.outside, dtype=self.tensor.dtype)
        here, there = [], []
        for first, length, size in zip(begin, self.block_shape, self.shape, strict=True):
            low, high = max(first, 0), max(min(first + length, size), max(first, 0))
            there.append(slice(low, high))
            here.append(slice(low - first, high - first))
        block[tuple(here)] = self.tensor[tuple(there)]
        return block


class tma:
    @staticmethod
    def async_copy_global_to_shared(
        tensor_desc: Descriptor, coord: Any, barrier: SharedMemory, result: SharedMemory, pred: Any = True
    ) -> None:
        if result.shape != tensor_desc.block_shape or result.dtype != tensor_desc.dtype:
            raise TypeError(
                f"a copy of {tensor_desc.dtype}{tensor_desc.block_shape} goes to {result.dtype}{result.shape}"
            )
        let_others_run()
        if not pred:
            return
        begin, signal = [int(to_value(each)) for each in coord], barrier.get_barrier()
        result.touch("a copy", is_write=True, over=(signal, signal.phase_number))
        poison(result.data)
        get_state().copies[signal] = signal.phase_number, find_line()
        signal.num_copies += 1

        def come() -> None:
            result.data.copy_(tensor_desc.read(begin))
            signal.end_copy(result.data.numel() * result.data.element_size())

        get_task().schedule.do_later(come)


class Accumulator:
    """The result of a product that has not been waited for."""

    def __init__(self, shape: list[int], layout: Any, finish: Callable[[], Value]) -> None:
        self.shape, self.layout, self.line = shape, layout, find_line()
        self._finish = finish
        self.value: Value | None = None

    def finish(self) -> None:
        self.value = self._finish()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name} of a product that began in {self.line} and was not waited for")


def _check_product(left: Any, right: SharedMemory, sums: Any) -> None:
    (rows, depth), (also_depth, columns) = left.shape, right.shape
    if depth != also_depth or sums.shape != [rows, columns] or left.dtype != right.dtype:
        raise TypeError(f"a product of {left.dtype}{left.shape} and {right.dtype}{right.shape} added to {sums.shape}")
    if sums.layout is not None and not isinstance(sums.layout, gl.NVMMADistributedLayout):
        raise TypeError(f"sums of products in a layout of other kind: {sums.layout}")
    if isinstance(left, Value) and left.layout is not None:
        is_operand = isinstance(left.layout, gl.DotOperandLayout) and left.layout.operand_index == 0
        if not is_operand or (sums.layout is not None and left.layout.parent != sums.layout):
            raise TypeError(f"an operand's layout is not one for these sums: {left.layout}")


def warpgroup_mma(
    a: Value | SharedMemory, b: SharedMemory, acc: Value | Accumulator, *, use_acc: Any = True,
    precision: Any = None, max_num_imprecise_acc: Any = None, is_async: bool = False,
) -> Value | Accumulator:  # fmt: skip
    _check_product(a, b, acc)
    let_others_run()
    state, adds = get_state(), bool(use_acc)
    state.num_products += 1
    for operand in (a, b):
        if isinstance(operand, SharedMemory):
            operand.touch("a product", is_write=False, over=((state, "product"), state.num_products))

    def finish() -> Value:
        product = a.data.float() @ b.data.float()
        before = acc.value if isinstance(acc, Accumulator) else acc
        assert before is not None, "products end in their order"
        return Value(product + before.data if adds else product, acc.layout)

    begun = Accumulator(acc.shape, acc.layout, finish)
    state.products.append(begun)
    return begun if is_async else warpgroup_mma_wait(0, [begun])


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Any = None) -> Any:
    """The operands that were waited for, as values; a product that may still be under way stays one."""
    if deps is None:
        raise ValueError("deps must be given")
    let_others_run()
    state = get_state()
    while len(state.products) > num_outstanding:
        state.products.popleft().finish()
        state.step("product")
    has_ended = [isinstance(each, Accumulator) and each.value is not None for each in deps]
    found = tuple(each.value if ended else each for each, ended in zip(deps, has_ended, strict=True))
    return found[0] if len(found) == 1 else found


def fence_async_shared(cluster: bool = False) -> None:
    """Copies and products that follow see this task's stores."""
    get_state().step("fence")
