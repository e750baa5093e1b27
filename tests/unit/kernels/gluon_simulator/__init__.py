"""Runs a Gluon kernel's own Python on CPU tensors, its partitions and programs in a random but repeatable order.

`launch` is what tests use. Places outside of tensors, waits and barriers that are left out, wrong phases, places that
are released too early, missing fences, layouts that differ, and deadlocks end a launch with an error that names the
kernel's lines, whatever the order was (`order`); what is read before it was written is NaN.

Not simulated: what the compiler makes of the kernel, registers, how the warps of a partition meet in shared memory,
writing what another program still reads, and time. A launch that failed is had again with its seed (`SEED`).
"""

from __future__ import annotations

import inspect
import itertools
import os
import random
from functools import partial
from typing import Any

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tests.unit.kernels.gluon_simulator.hopper import Descriptor
from tests.unit.kernels.gluon_simulator.language import run_partition
from tests.unit.kernels.gluon_simulator.memory import OutOfBounds, Pointer
from tests.unit.kernels.gluon_simulator.order import Race, State, get_state
from tests.unit.kernels.gluon_simulator.schedule import Deadlock, Schedule, Task, TookTooLong, wait_until
from tests.unit.kernels.gluon_simulator.translate import translate
from tests.unit.kernels.gluon_simulator.values import to_value

__all__ = ["Deadlock", "OutOfBounds", "Race", "Simulated", "TookTooLong", "launch"]

SEED = "TOKA_TEST_GLUON_SEED"
"""Environment variable: the seed of every launch, to have one again that failed."""
LIMIT_S = 60.0
_MOST_AT_ONCE = 4


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run all programs; `kernel` is a `gluon.jit` function, and arguments are what a launch on a GPU takes.

    Raises what a program raised, with a note that says which and with what seed.
    """
    seed = int(os.environ.get(SEED) or random.SystemRandom().randrange(2**32))
    print(f"launched with {SEED}={seed}")  # seen if the test fails
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small operations, and every thread would start others of its own
    try:
        _run(translate(kernel), Schedule(seed, LIMIT_S), (*grid, 1, 1)[:3], _bind(kernel, arguments, constants))
    except BaseException as error:
        error.add_note(f"again with {SEED}={seed}")
        raise
    finally:
        torch.set_num_threads(num_threads)


class Simulated:
    """Stands for a kernel where there is no GPU."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def start(*arguments: Any, num_warps: int, launch_pdl: bool, **constants: Any) -> None:
            launch(self._kernel, grid, *arguments, **constants)

        return start


def _run(function: Any, schedule: Schedule, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    programs = list(itertools.product(*map(range, grid)))
    schedule.chance.shuffle(programs)
    most = schedule.chance.randint(1, _MOST_AT_ONCE)
    begun: list[Task] = []

    def is_one_free() -> bool:
        return sum(not task.has_ended for task in begun) < most

    def run_program() -> None:
        run_partition(partial(function, **arguments), ())
        state = get_state()
        for barrier, (number, line) in state.copies.items():
            if state.clock.get(barrier, 0) < number:
                raise Race(f"the program may end before a copy that began in {line}")

    def begin_programs() -> None:
        for program in programs:
            wait_until(is_one_free, lambda: "programs that run to end")
            number = program[0] if grid[1:] == (1, 1) else program
            begun.append(schedule.add(f"program {number}", run_program))
            begun[-1].state = State(program, grid)

    schedule.add("the launch", begin_programs)
    schedule.run()


def _bind(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> dict[str, Any]:
    """Binds arguments by name, constants as they are."""
    signature = inspect.signature(kernel.fn)
    bound = signature.bind(*arguments, **constants).arguments
    is_constant = {name: "constexpr" in str(each.annotation) for name, each in signature.parameters.items()}
    return {name: each if is_constant[name] else _pass(each) for name, each in bound.items()}


def _pass(argument: Any) -> Any:
    """Passes a value as a kernel is given it."""
    if isinstance(argument, torch.Tensor):
        return Pointer.to(argument)
    if isinstance(argument, TensorDescriptor):
        return Descriptor(argument)
    if isinstance(argument, tuple):
        return tuple(map(_pass, argument))
    return argument if argument is None or isinstance(argument, bool) else to_value(argument)
