"""Processes that do for the server what would hold up its event loop, or might not live through it.

Owns: how such a process is started, asked, found to be lost, and ended; and how many of a kind there are. Each works on
one thing at a time, over pipes: what goes there and back is its length and so many bytes. Where a process had no CPU
time to spend, because others had the CPUs or somebody stopped it, that is no fault of what it was given.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import struct
from collections.abc import AsyncIterator, Sequence
from typing import TypeAlias

from toka_engine.portable import read_cpu_s

logger = logging.getLogger("toka.server")

LENGTH = struct.Struct("<I")
_MIN_BLAMED_S = 1.0
"""CPU time of a process that does not answer, from which on what it was given is to blame."""
_START_S = 60.0

Part: TypeAlias = bytes | bytearray


class HelperDiedError(Exception):
    """The process has ended, or did not answer in time."""


class HelperLateError(HelperDiedError):
    """It did not answer in time, and has worked all the while."""


class HelperStarvedError(HelperDiedError):
    """It did not answer in time, and has not worked much."""


class HelperNotStartedError(Exception):
    """No process can be started."""


class Helper:
    """One process. Used by one task at a time."""

    def __init__(self, process: asyncio.subprocess.Process, max_answer_bytes: int) -> None:
        self._process = process
        self._max_answer_bytes = max_answer_bytes
        self.is_spent = False
        """The process ends after the answer that it has given."""

    @classmethod
    async def start(cls, command: Sequence[str], setup: bytes, max_answer_bytes: int) -> Helper:
        """Start a process and wait until it can be asked. Raises HelperDiedError."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
        helper = cls(process, max_answer_bytes)
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
            raise HelperDiedError from error

    async def end(self) -> None:
        """End the process, whatever it does."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()


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
            try:
                helper = await self._take_idle()
                helper = helper or await Helper.start(self._command, self._setup, self._max_answer_bytes)
            except (HelperDiedError, OSError) as error:
                logger.error("event=%s_not_started error=%s", self._name, type(error).__name__)
                raise HelperNotStartedError from error
            try:
                yield helper
            except BaseException:
                await helper.end()
                raise
            if helper.is_spent or len(self._idle) >= max(1, self._num_waiting):
                await helper.end()
            else:
                self._idle.append(helper)
        finally:
            self._room.release()

    async def _take_idle(self) -> Helper | None:
        """Return a process that waits for work. One that ended meanwhile (the kernel was short of memory, somebody
        killed it) is no fault of what comes next, which gets another one.
        """
        while self._idle:
            helper = self._idle.pop()
            if not helper.has_ended:
                return helper
            logger.warning("event=%s_lost", self._name)
            await helper.end()
        return None
