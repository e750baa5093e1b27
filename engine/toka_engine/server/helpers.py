"""Processes that do for the server what would hold up its event loop, or might not live through it.

Owns: how such a process is started, asked, found to be lost, and ended; how many of a kind there are, and when another
one is started. Each works on one thing at a time, over pipes: what goes there and back is its length and so many bytes.
Where a process had no CPU time to spend, because others had the CPUs or somebody stopped it, that is no fault of what
it was given.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import struct
import time
from collections.abc import AsyncIterator, Sequence
from typing import TypeAlias

from toka_engine.portable import is_stopped, read_cpu_s

logger = logging.getLogger("toka.server")

LENGTH = struct.Struct("<I")
_NICENESS = 5
"""These processes stand back by so much where the CPU is short, from their first instruction: others wait for tokens.
They must not starve either."""
_MIN_BLAMED_S = 1.0
"""CPU time of a process that does not answer, from which on what it was given is to blame."""
_START_S = 60.0
_LOOK_S = 1.0
"""A process that has not answered is looked at so often."""
_MAX_LOOKS_STOPPED = 5
"""One that a signal has stopped for so many looks is lost: whoever stopped it may have let it go on meanwhile."""
_MAX_PAUSE_S = 30.0
_FORGET_S = 60.0
"""A loss is forgotten after so long without another."""

Part: TypeAlias = bytes | bytearray


class HelperDiedError(Exception):
    """The process has ended, or did not answer in time."""


class HelperLateError(HelperDiedError):
    """It did not answer in time, and has worked all the while."""


class HelperStarvedError(HelperDiedError):
    """It did not answer in time, and has not worked much."""


class HelperNotStartedError(Exception):
    """No process can be started."""

    def __init__(self, retry_after_s: float) -> None:
        """`retry_after_s`: the time until the next try."""
        super().__init__(f"the next start is {retry_after_s:.1f} s away")
        self.retry_after_s = retry_after_s


class Helper:
    """One process. Used by one task at a time."""

    def __init__(self, process: asyncio.subprocess.Process, max_answer_bytes: int) -> None:
        self._process = process
        self._max_answer_bytes = max_answer_bytes
        self.is_spent = False
        """The process ends after the answer that it has given."""
        self.started_s = time.monotonic()
        self._was_stopped = False

    @classmethod
    async def start(cls, command: Sequence[str], setup: bytes, max_answer_bytes: int) -> Helper:
        """Start a process and wait until it can be asked. Raises HelperDiedError."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
        helper = cls(process, max_answer_bytes)
        with contextlib.suppress(ProcessLookupError):  # which the first question finds
            os.setpriority(os.PRIO_PROCESS, process.pid, os.getpriority(os.PRIO_PROCESS, 0) + _NICENESS)
        try:
            await helper.ask((setup,), _START_S)
        except BaseException:
            await helper.end()
            raise
        return helper

    @property
    def has_ended(self) -> bool:
        """Return whether the process is gone: the end of its answers has come, or nobody reads what it is given."""
        stdin, stdout = self._process.stdin, self._process.stdout
        return stdin is None or stdout is None or stdin.is_closing() or stdout.at_eof()

    async def ask(self, parts: Sequence[Part], timeout_s: float) -> bytes:
        """Send `parts` as one message and return the answer. Raises HelperDiedError."""
        if self._process.stdin is None or self._process.stdout is None:
            raise AssertionError("started with pipes")
        if self.has_ended:  # whose pipe takes no more
            raise HelperDiedError
        cpu_s = read_cpu_s(self._process.pid)
        self._was_stopped = False
        self._look_later(num_stopped=0)
        try:
            async with asyncio.timeout(timeout_s):
                self._process.stdin.write(LENGTH.pack(sum(map(len, parts))))
                for part in parts:
                    self._process.stdin.write(part)
                await self._process.stdin.drain()
                (length,) = LENGTH.unpack(await self._process.stdout.readexactly(LENGTH.size))
                if length > self._max_answer_bytes:
                    raise HelperDiedError
                return await self._process.stdout.readexactly(length)
        except TimeoutError as error:
            now_s = read_cpu_s(self._process.pid)
            if cpu_s is not None and now_s is not None and now_s - cpu_s < _MIN_BLAMED_S:
                raise HelperStarvedError from error
            raise HelperLateError from error
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise (HelperStarvedError if self._was_stopped else HelperDiedError) from error
        finally:
            self._next_look.cancel()

    def _look_later(self, num_stopped: int) -> None:
        self._next_look = asyncio.get_running_loop().call_later(_LOOK_S, self._look, num_stopped)

    def _look(self, num_stopped: int) -> None:
        """End a process that somebody has stopped, so that nobody waits until its time is over. One that gets no CPU
        because others have it is not stopped, however little it does.
        """
        num_stopped = num_stopped + 1 if is_stopped(self._process.pid) else 0
        if num_stopped < _MAX_LOOKS_STOPPED:
            self._look_later(num_stopped)
            return
        self._was_stopped = True
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def end(self) -> None:
        """End the process, whatever it does."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()


class _Losses:
    """The pauses between the starts of processes that are lost again and again. Behind the first loss there is none:
    whoever asks next gets a new process. When that one is lost within a minute, too, there is a pause, and a longer one
    with each that follows, so that what ends them all does not have the server start one after the other.
    """

    def __init__(self) -> None:
        self._pause_s = 0.0
        self._last_s = -math.inf

    def note(self, started_s: float) -> float:
        """Count the loss of a process that was started at `started_s`; return the pause that follows. What was lost
        together with an earlier one is no further loss.
        """
        now = time.monotonic()
        if now - self._last_s > _FORGET_S:
            self._last_s, self._pause_s = now, 0.0
        elif started_s >= self._last_s:
            self._last_s, self._pause_s = now, min(_MAX_PAUSE_S, max(1.0, 2 * self._pause_s))
        return self._pause_s

    @property
    def remaining_s(self) -> float:
        """Return the time until a process may be started."""
        return max(0.0, self._last_s + self._pause_s - time.monotonic())


class HelperPool:
    """All processes of one kind. The first one starts when it is needed; all end with the server."""

    def __init__(self, name: str, command: Sequence[str], setup: bytes, *, most: int, max_answer_bytes: int) -> None:
        """`name`: for the log; `setup`: the first message to each process; `most`: so many at once."""
        self._name = name
        self._command = command
        self._setup = setup
        self._max_answer_bytes = max_answer_bytes
        self._room = asyncio.Semaphore(most)
        self._num_waiting = 0
        self._idle: list[Helper] = []
        self._starting = asyncio.Lock()
        self._losses = _Losses()

    @contextlib.asynccontextmanager
    async def one(self, wait_s: float | None = None) -> AsyncIterator[Helper]:
        """Take a process, starting one where none is idle; keep one afterwards, or as many as are waited for, and none
        that failed. Raises TimeoutError where none gets free in `wait_s`, and HelperNotStartedError.
        """
        self._num_waiting += 1
        try:
            async with asyncio.timeout(wait_s):
                await self._room.acquire()
        finally:
            self._num_waiting -= 1
        try:
            helper = await self._take_idle() or await self._start()
            try:
                yield helper
            except BaseException as error:
                if isinstance(error, HelperDiedError) and not isinstance(error, HelperLateError):
                    self._note_loss("lost", helper.started_s, error)
                await helper.end()
                raise
            if helper.is_spent or len(self._idle) >= max(1, self._num_waiting):
                await helper.end()
            else:
                self._idle.append(helper)
        finally:
            self._room.release()

    async def _start(self) -> Helper:
        """Start a process, where there is no pause: one at a time. Raises HelperNotStartedError."""
        async with self._starting:
            if remaining_s := self._losses.remaining_s:
                raise HelperNotStartedError(remaining_s)
            started_s = time.monotonic()
            try:
                return await Helper.start(self._command, self._setup, self._max_answer_bytes)
            except (HelperDiedError, OSError) as error:
                raise HelperNotStartedError(self._note_loss("not_started", started_s, error)) from error

    def _note_loss(self, event: str, started_s: float, error: Exception | None = None) -> float:
        """Count the loss of a process; return the pause that follows."""
        pause_s = self._losses.note(started_s)
        reason = "ended" if error is None else type(error).__name__
        logger.error("event=%s_%s error=%s pause_s=%g", self._name, event, reason, pause_s)
        return pause_s

    async def _take_idle(self) -> Helper | None:
        """Return a process that waits for work. One that ended meanwhile (the kernel was short of memory, somebody
        killed it) is no fault of what comes next, which gets another one.
        """
        while self._idle:
            helper = self._idle.pop()
            if not helper.has_ended:
                return helper
            self._note_loss("lost", helper.started_s)
            await helper.end()
        return None
