"""A kernel's Python function with other names: what it has of Gluon stands for what is simulated."""

from __future__ import annotations

import types
from typing import Any

from triton import language as triton_language
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper as real_hopper
from triton.language.extra import cuda
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from tests.unit.kernels.gluon_simulator import hopper
from tests.unit.kernels.gluon_simulator.language import FUNCTIONS, Language, do_nothing
from tests.unit.kernels.gluon_simulator.values import count_up

_STANDS_FOR = {
    id(gl): Language(),
    id(triton_language): Language(),
    id(real_hopper.mbarrier): hopper.mbarrier,
    id(real_hopper.tma): hopper.tma,
    id(real_hopper.warpgroup_mma): hopper.warpgroup_mma,
    id(real_hopper.warpgroup_mma_wait): hopper.warpgroup_mma_wait,
    id(real_hopper.fence_async_shared): hopper.fence_async_shared,
    id(real_hopper): hopper,
    id(cuda.gdc_wait): do_nothing,
    id(cuda.gdc_launch_dependents): do_nothing,
    **{id(getattr(gl, name)): function for name, function in FUNCTIONS.items()},
}


def translate(kernel: Any) -> Any:
    """The function of a jit function, and of all that it calls."""
    return _translate(kernel, {})


def _translate(kernel: Any, known: dict[int, Any]) -> Any:
    if id(kernel) not in known:
        function = kernel.fn
        names: dict[str, Any] = {}
        closure = tuple(types.CellType() for _ in function.__closure__ or ())
        known[id(kernel)] = types.FunctionType(
            function.__code__, names, function.__name__, function.__defaults__, closure
        )
        known[id(kernel)].__kwdefaults__ = function.__kwdefaults__
        used = set(_find_names(function.__code__))
        names.update({name: _replace(each, known) for name, each in function.__globals__.items() if name in used})
        names["range"] = count_up
        for new, cell in zip(closure, function.__closure__ or (), strict=True):
            new.cell_contents = _replace(cell.cell_contents, known)
    return known[id(kernel)]


def _find_names(code: types.CodeType) -> tuple[str, ...]:
    inner = [each for each in code.co_consts if isinstance(each, types.CodeType)]
    return code.co_names + tuple(name for each in inner for name in _find_names(each))


def _replace(each: Any, known: dict[int, Any]) -> Any:
    if id(each) in _STANDS_FOR:
        return _STANDS_FOR[id(each)]
    if isinstance(each, (JITFunction, InterpretedFunction)):
        return _translate(each, known)
    return each.value if isinstance(each, gl.constexpr) else each
