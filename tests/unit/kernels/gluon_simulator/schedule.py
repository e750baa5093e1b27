"""Which thread of a simulated launch goes on, chosen by chance at every point where one may notice another.

Each task has a thread of its own, but one alone runs at a time: a launch is the same again with the same seed, and one
that has stopped for ever is seen at once. Copies that are under way are chosen like tasks. Some tasks and all copies of
some launches are chosen rarely, so that one is far ahead of another, or a copy comes long after it was asked for.
"""

from __future__ import annotations

import ctypes
import random
import sys
import threading
import time
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

_HERE = str(Path(__file__).parent)
_MOST_LINES = 3
_WEIGHTS = (0.02, 0.3, 1.0)
_local = threading.local()


class Deadlock(Exception):
    """Every task waits for something that no other will do."""


class TookTooLong(Exception):
    """The launch has not ended within its limit."""


class _Ended(BaseException):
    """Ends a task's thread because the launch has ended; not for anyone to catch."""


def find_line(frame: types.FrameType | None = None) -> str:
    """The kernel's own line that is running, and those that called it: file:line, innermost first."""
    lines = []
    frame = frame or sys._getframe()
    while frame is not None and frame.f_code.co_filename != threading.__file__:
        if not frame.f_code.co_filename.startswith(_HERE):
            lines.append(f"{_get_name(frame.f_code.co_filename)}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(lines[:_MOST_LINES]) or "the simulator"


@cache
def _get_name(path: str) -> str:
    return Path(path).name


def _make_gate() -> threading.Lock:
    """A lock that one thread waits for and another one opens; shut."""
    gate = threading.Lock()
    gate.acquire()
    return gate


class Task:
    """The work of one thread: a program, or a partition of one."""

    def __init__(self, schedule: Schedule, name: str, call: Callable[[], None], weight: float) -> None:
        self.schedule, self.name, self.weight = schedule, name, weight
        self.may_go_on: Callable[[], bool] | None = None
        self.waits_for: Callable[[], str] = lambda: "its turn"
        self.has_ended = False
        self.state: Any = None
        self._call = call
        self._turn = _make_gate()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def begin(self) -> None:
        self._thread.start()

    def pause(self) -> None:
        """Let others run, until this one is chosen again."""
        if not self.schedule.is_over:
            self.schedule.come_back.release()
            self._turn.acquire()
        if self.schedule.is_over:
            raise _Ended

    def go_on(self) -> None:
        """Run until the task pauses or ends. By the schedule."""
        self.may_go_on = None
        self._turn.release()

    def end(self) -> None:
        """Wherever it is: at its turn, or at work for too long."""
        if not self.has_ended and self._turn.locked():
            self._turn.release()
        self._thread.join(1.0)
        if self._thread.is_alive():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self._thread.ident or 0), ctypes.py_object(_Ended)
            )
            self._thread.join()

    def find_line(self) -> str:
        return find_line(sys._current_frames().get(self._thread.ident or 0))

    def _run(self) -> None:
        self._turn.acquire()
        _local.task = self
        try:
            if not self.schedule.is_over:
                self._call()
        except _Ended:
            pass
        except BaseException as error:  # handed to the thread that launched
            error.add_note(f"in {self.name}")
            self.schedule.error = self.schedule.error or error
        finally:
            self.has_ended = True
            if not self.schedule.is_over:
                self.schedule.come_back.release()


class Schedule:
    """The tasks of one launch, and what is to happen at some time."""

    def __init__(self, seed: int, limit_s: float) -> None:
        self.chance = random.Random(seed)
        self.come_back = _make_gate()
        self.error: BaseException | None = None
        self.is_over = False
        self._tasks: list[Task] = []
        self._later: list[Callable[[], None]] = []
        self._later_weight = self.chance.choice(_WEIGHTS)
        self._limit_s = limit_s

    def add(self, name: str, call: Callable[[], None]) -> Task:
        task = Task(self, name, call, self.chance.choice(_WEIGHTS))
        self._tasks.append(task)
        task.begin()
        return task

    def do_later(self, action: Callable[[], None]) -> None:
        self._later.append(action)

    def run(self) -> None:
        """Until all tasks have ended; raises what any of them raised."""
        end_s = time.monotonic() + self._limit_s
        try:
            while self._tasks:
                self._step(end_s)
        finally:
            self.is_over = True
            for task in self._tasks:
                task.end()

    def _step(self, end_s: float) -> None:
        ready = [task for task in self._tasks if task.may_go_on is None or task.may_go_on()]
        weights = [task.weight for task in ready] + [self._later_weight] * bool(self._later)
        if not weights:
            raise Deadlock(
                "\n".join(["nothing can go on:", *(f"  {task.name}: {task.waits_for()}" for task in self._tasks)])
            )
        chosen = self.chance.choices(range(len(weights)), weights)[0]
        if chosen == len(ready):
            self._later.pop(self.chance.randrange(len(self._later)))()
            return
        task = ready[chosen]
        task.go_on()
        if not self.come_back.acquire(timeout=max(0.0, end_s - time.monotonic())):
            raise TookTooLong(f"more than {self._limit_s} s; {task.name} is in {task.find_line()}")
        if self.error is not None:
            raise self.error
        if task.has_ended:
            self._tasks.remove(task)
            task.end()


def get_task() -> Task:
    """The task of the thread that asks."""
    task: Task = _local.task
    return task


def let_others_run() -> None:
    task = get_task()
    task.waits_for = lambda: "its turn"
    task.pause()


def wait_until(may_go_on: Callable[[], bool], waits_for: Callable[[], str]) -> None:
    task, line = get_task(), find_line()
    task.may_go_on = may_go_on
    task.waits_for = lambda: f"{line} waits for {waits_for()}"
    task.pause()
