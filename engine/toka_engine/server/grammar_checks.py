"""Has each grammar compiled by a disposable process before a worker sees it.

Owns: the checker processes, which sources are known to be good, and which have taken too much. A process works on one
source at a time, by a child that takes what goes wrong with it; a source that the child does not survive, or on which
it spends its time without an answer, is refused for a while without another try. Where it had no time to spend, because
others had the CPUs or somebody stopped it, or where the process itself is lost, that is no fault of the source. The
library that compiles is never loaded here.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import sys
import time
from collections import OrderedDict
from typing import Generic, TypeVar

import msgspec

from toka_engine.grammar.protocol import Setup, Verdict
from toka_engine.grammar.source import GrammarSource
from toka_engine.server.errors import ApiError, invalid, unavailable
from toka_engine.server.grammar_requests import AskedGrammar
from toka_engine.server.helpers import HelperDiedError, HelperNotStartedError, HelperPool, HelperStarvedError

logger = logging.getLogger("toka.server")

COMMAND = (sys.executable, "-m", "toka_engine.grammar")
MAX_PROCESSES = 2
ANSWER_S = 3.0
"""Wall time for one source. The process's own limits of CPU and of wall time are below it."""
WAIT_S = 1.0
"""Time that a source waits for a process; then 429."""
REFUSE_S = 600.0
"""Time for which a source that has taken too much is refused without another try."""
_MAX_KNOWN = 1024
_MAX_ANSWER_BYTES = 1 << 20

K = TypeVar("K")
V = TypeVar("V")


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
        self._pool = HelperPool(
            "grammar_checker",
            COMMAND,
            msgspec.msgpack.encode(setup),
            most=MAX_PROCESSES,
            max_answer_bytes=_MAX_ANSWER_BYTES,
        )
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
            verdict = await asyncio.shield(task)
        except HelperStarvedError as error:
            raise _late() from error
        except HelperDiedError as error:
            raise unavailable("The process that compiles grammars was lost.") from error
        if verdict.failure == "starved":
            raise _late()
        if verdict.failure:
            raise _too_complex(asked.param)
        return verdict

    async def _ask(self, source: GrammarSource, digest: bytes) -> Verdict:
        try:
            verdict = await self._compile(source)
        except HelperDiedError:
            logger.warning("event=grammar_checker_died kind=%s bytes=%d", source.kind, len(source.text))
            raise
        if verdict.failure == "starved":
            logger.warning("event=grammar_checker_starved kind=%s bytes=%d", source.kind, len(source.text))
        elif verdict.failure:
            self._refused.put(digest, time.monotonic() + REFUSE_S)
            logger.warning("event=grammar_refused kind=%s bytes=%d", source.kind, len(source.text))
        else:
            self._verdicts.put(digest, verdict)
        return verdict

    async def _compile(self, source: GrammarSource) -> Verdict:
        """Have a process compile the source. Raises HelperDiedError, and a 4xx or 503."""
        try:
            async with self._pool.one(WAIT_S) as helper:
                answer = await helper.ask((msgspec.msgpack.encode(source),), ANSWER_S)
                try:
                    return msgspec.msgpack.decode(answer, type=Verdict)
                except msgspec.DecodeError as error:
                    raise HelperDiedError from error
        except TimeoutError as error:
            message = "Too many grammars are being compiled."
            raise ApiError(429, message, code="grammars_busy", headers=((b"retry-after", b"1"),)) from error
        except HelperNotStartedError as error:
            raise unavailable("Grammars cannot be compiled now.", error.retry_after_s) from error


def _late() -> ApiError:
    return unavailable("The grammar could not be compiled in time: the server is overloaded.")


def _too_complex(param: str) -> ApiError:
    message = f"'{param}' takes too much time or memory to compile. Make it smaller, or less nested."
    return invalid(param, message, "grammar_too_complex")
