"""Has each grammar compiled by a disposable process before a worker sees it.

Owns: the checker processes, which sources are known to be good, and which have taken too much. A process works on one
source at a time; a source that it does not survive, or on which it spends its time without an answer, is refused for a
while without another try. Where it had no time to spend, because others had the CPUs or somebody stopped it, that is
no fault of the source. The library that compiles is never loaded here.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import sys
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

import msgspec

from toka_engine.grammar.protocol import LENGTH, Setup, Verdict
from toka_engine.grammar.source import GrammarSource
from toka_engine.portable import read_cpu_s
from toka_engine.server.errors import ApiError, invalid, unavailable
from toka_engine.server.grammar_requests import AskedGrammar

logger = logging.getLogger("toka.server")

COMMAND = (sys.executable, "-m", "toka_engine.grammar")
MAX_PROCESSES = 2
ANSWER_S = 3.0
"""Wall time for one source. The process's own limit of CPU time is below it."""
WAIT_S = 1.0
"""Time that a source waits for a process; then 429."""
REFUSE_S = 600.0
"""Time for which a source that has taken too much is refused without another try."""
_MIN_BLAMED_S = 1.0
"""CPU time of a process that does not answer, from which on its source is to blame."""
_START_S = 60.0
_MAX_KNOWN = 1024
_MAX_ANSWER_BYTES = 1 << 20

K = TypeVar("K")
V = TypeVar("V")


class CheckerDiedError(Exception):
    """The process has ended, or did not answer in time."""


class CheckerStarvedError(CheckerDiedError):
    """It did not answer in time, and has not worked much."""


class _Checker:
    """One process. Used by one task at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.is_spent = False
        """The process ends after the answer that it has given."""

    @classmethod
    async def start(cls, setup: Setup) -> _Checker:
        """Start a process and wait until it takes sources. Raises CheckerDiedError."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*COMMAND, stdin=pipe, stdout=pipe)
        checker = cls(process)
        try:
            await checker.ask(setup, _START_S)
        except BaseException:
            await checker.end()
            raise
        return checker

    @property
    def has_ended(self) -> bool:
        """Return whether the process is gone: the end of its answers has come, or nobody reads its sources."""
        stdin, stdout = self._process.stdin, self._process.stdout
        return stdin is None or stdout is None or stdin.is_closing() or stdout.at_eof()

    async def ask(self, message: msgspec.Struct, timeout_s: float) -> Verdict:
        """Send `message` and return the answer. Raises CheckerDiedError."""
        if self._process.stdin is None or self._process.stdout is None:
            raise AssertionError("started with pipes")
        if self.has_ended:  # whose pipe takes no more
            raise CheckerDiedError
        body, cpu_s = msgspec.msgpack.encode(message), read_cpu_s(self._process.pid)
        try:
            async with asyncio.timeout(timeout_s):
                self._process.stdin.write(LENGTH.pack(len(body)) + body)
                await self._process.stdin.drain()
                (length,) = LENGTH.unpack(await self._process.stdout.readexactly(LENGTH.size))
                if length > _MAX_ANSWER_BYTES:
                    raise CheckerDiedError
                verdict = msgspec.msgpack.decode(await self._process.stdout.readexactly(length), type=Verdict)
                self.is_spent = verdict.is_last
                return verdict
        except TimeoutError as error:
            now_s = read_cpu_s(self._process.pid)
            if cpu_s is not None and now_s is not None and now_s - cpu_s < _MIN_BLAMED_S:
                raise CheckerStarvedError from error
            raise CheckerDiedError from error
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.DecodeError) as error:
            raise CheckerDiedError from error

    async def end(self) -> None:
        """End the process, whatever it does."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()


class _Recent(Generic[K, V]):
    """A dictionary of the last _MAX_KNOWN keys used."""

    def __init__(self) -> None:
        self._values: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: K, value: V) -> None:
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > _MAX_KNOWN:
            self._values.popitem(last=False)

    def drop(self, key: K) -> None:
        self._values.pop(key, None)


class GrammarChecks:
    """All checks of this server. The first process starts with the first grammar; all end with the server."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._room = asyncio.Semaphore(MAX_PROCESSES)
        self._idle: list[_Checker] = []
        # By digest: a thousand sources could have a gigabyte.
        self._verdicts: _Recent[bytes, Verdict] = _Recent()
        self._refused: _Recent[bytes, float] = _Recent()
        self._running: dict[GrammarSource, asyncio.Task[Verdict]] = {}

    async def check(self, asked: AskedGrammar) -> list[str]:
        """Return the names of the keywords that a lenient source has and that are not enforced.

        Raises a 400 that says why the source cannot be used, and a 429 where too many others are being checked.
        """
        if not self._setup.end_ids:
            raise invalid(asked.param, f"'{asked.param}' is not supported: this model has no token that ends a text.")
        digest = hashlib.sha256(msgspec.msgpack.encode(asked.source)).digest()
        verdict = self._verdicts.get(digest)
        if verdict is None:
            verdict = await self._check_once(asked, digest)
        if verdict.error:
            raise invalid(asked.param, f"'{asked.param}' cannot be used: {verdict.error}.", "invalid_grammar")
        return verdict.dropped

    async def _check_once(self, asked: AskedGrammar, digest: bytes) -> Verdict:
        """Check the source, or wait for the check of an equal one."""
        source = asked.source
        if time.monotonic() < (self._refused.get(digest) or 0.0):
            raise _too_complex(asked.param)
        task = self._running.get(source)
        if task is None:
            # A task of its own: a client that leaves takes only its own wait with it.
            task = self._running[source] = asyncio.create_task(self._ask(source, digest))
            task.add_done_callback(lambda _: self._running.pop(source, None))
        try:
            return await asyncio.shield(task)
        except CheckerStarvedError as error:
            raise unavailable("The grammar could not be compiled in time: the server is overloaded.") from error
        except CheckerDiedError as error:
            raise _too_complex(asked.param) from error

    async def _ask(self, source: GrammarSource, digest: bytes) -> Verdict:
        async with self._one_checker() as checker:
            try:
                verdict = await checker.ask(source, ANSWER_S)
            except CheckerStarvedError:
                logger.warning("event=grammar_checker_starved kind=%s bytes=%d", source.kind, len(source.text))
                raise
            except CheckerDiedError:
                self._refused.put(digest, time.monotonic() + REFUSE_S)
                logger.warning("event=grammar_refused kind=%s bytes=%d", source.kind, len(source.text))
                raise
        self._verdicts.put(digest, verdict)
        return verdict

    @contextlib.asynccontextmanager
    async def _one_checker(self) -> AsyncIterator[_Checker]:
        """Take a process, starting one where none is idle; keep at most one idle afterwards, and none that failed."""
        try:
            async with asyncio.timeout(WAIT_S):
                await self._room.acquire()
        except TimeoutError as error:
            message = "Too many grammars are being compiled."
            raise ApiError(429, message, code="grammars_busy", headers=((b"retry-after", b"1"),)) from error
        try:
            try:
                checker = await self._take_idle() or await _Checker.start(self._setup)
            except (CheckerDiedError, OSError) as error:
                logger.error("event=grammar_checker_not_started error=%s", type(error).__name__)
                raise unavailable("Grammars cannot be compiled now.") from error
            try:
                yield checker
            except BaseException:
                await checker.end()
                raise
            if self._idle or checker.is_spent:
                await checker.end()
            else:
                self._idle.append(checker)
        finally:
            self._room.release()

    async def _take_idle(self) -> _Checker | None:
        """Return a process that waits for work. One that ended meanwhile (the kernel was short of memory, somebody
        killed it) is no fault of the next source, which gets another one.
        """
        while self._idle:
            checker = self._idle.pop()
            if not checker.has_ended:
                return checker
            logger.warning("event=grammar_checker_lost")
            await checker.end()
        return None


def _too_complex(param: str) -> ApiError:
    message = f"'{param}' takes too much time or memory to compile. Make it smaller, or less nested."
    return invalid(param, message, "grammar_too_complex")
