"""The real model worker, but as rank or stage 1 it does TOKA_TEST_FAULT at its eighth step of serving.

late: it never begins the step, and answers. disagreeing: it takes the step for another one. stuck: it stays in the step
after the last exchange, which its peer ends.
"""

import os
import threading
from itertools import count
from typing import Any

import msgspec
from toka_engine.child import Child, run_child
from toka_engine.messages import Step
from toka_engine.model.cpu.runner import CpuRunner
from toka_engine.model.worker import run_worker

STEP = 8


def go_astray(child: Child, link_fds: list[int]) -> None:
    fault = os.environ["TOKA_TEST_FAULT"]
    if child.start.rank.tp_rank + child.start.rank.pp_rank == 1:
        begin, launch = child.begin_step, CpuRunner.launch
        steps = count(1)

        def begin_step() -> None:
            if next(steps) == STEP and fault == "late":
                threading.Event().wait()
            begin()

        def launch_another(self: CpuRunner, step: Step) -> Any:
            is_due = step.number > 0 and next(steps) == STEP
            if is_due and fault == "disagreeing":
                step = msgspec.structs.replace(step, number=step.number + 1000)
            launched = launch(self, step)
            if is_due and fault == "stuck":
                threading.Event().wait()
            return launched

        if fault == "late":
            child.begin_step = begin_step  # type: ignore[method-assign]
        else:
            CpuRunner.launch = launch_another  # type: ignore[method-assign]
    run_worker(child, link_fds)


if __name__ == "__main__":
    run_child("model", go_astray)
