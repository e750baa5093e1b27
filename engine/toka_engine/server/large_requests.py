"""Has large requests made ready by a process of their own, so that the event loop goes on meanwhile.

Owns: which requests are large, and those processes. A thread would not do: decoding, checking and rendering hold the
interpreter lock. Whatever is done there is the same function that makes small requests ready here; it comes back as
its value, or as the refusal that it raised.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Generic, TypeVar

import msgspec

from toka_engine.codec import accept_array, decode_array, encode_array
from toka_engine.config import EngineConfig
from toka_engine.messages import EngineInfo
from toka_engine.server.calls.formats import CallReader
from toka_engine.server.calls.registry import READERS_BY_CLASS
from toka_engine.server.engine import Folders
from toka_engine.server.errors import ApiError, ClientGoneError, invalid, unavailable
from toka_engine.server.exchange import BodyBudget
from toka_engine.server.helpers import LENGTH, HelperDiedError, HelperLateError, HelperNotStartedError, HelperPool
from toka_engine.server.preparation import Preparation
from toka_engine.server.stops import StopStrings

V = TypeVar("V")

logger = logging.getLogger("toka.server")

COMMAND = (sys.executable, "-m", "toka_engine.server.preparing")
LARGE_BYTES = 64 * 1024
"""The size from which a request is large."""
MANY_QUOTES = 1024
"""The number of quotation marks from which it is, too: each text and key takes up to five microseconds."""
_SMALL_BYTES = 4 * 1024
"""The size below which quotation marks are not counted."""
MAX_PROCESSES = 1
"""One makes prompts ready faster than an engine computes them; a start takes longer than the usual wait for it."""
ANSWER_S = 30.0
"""Wall time for one request."""
_MAX_ANSWER_BYTES = (1 << 32) - 1


def is_large(body: bytes | bytearray, num_further_bytes: int) -> bool:
    """Return whether a request would hold up the event loop for more than a few milliseconds."""
    num_bytes = len(body) + num_further_bytes
    return num_bytes > LARGE_BYTES or (num_bytes > _SMALL_BYTES and body.count(b'"') > MANY_QUOTES)


class Preparer(Generic[V]):
    """A function that makes requests ready: of a Preparation, a body, and what msgpack can carry."""

    def __init__(self, name: str, prepare: Callable[..., Awaitable[V]], value_type: type[V]) -> None:
        """`name`: how processes call it; `value_type`: the type that it returns."""
        self.name = name
        self.prepare = prepare
        self._decoder = msgspec.msgpack.Decoder(value_type, ext_hook=decode_array, dec_hook=_decode_custom)

    def decode(self, value: msgspec.Raw) -> V:
        """Return a value that has been encoded."""
        return self._decoder.decode(value)


def _encode_custom(value: Any) -> Any:
    if isinstance(value, StopStrings):
        return value.patterns
    if isinstance(value, CallReader):
        return type(value).__name__, value.parameters
    return encode_array(value)


def _decode_custom(kind: Any, value: Any) -> Any:
    if kind is StopStrings:
        return StopStrings(tuple(value))
    if kind is CallReader:
        return READERS_BY_CLASS[value[0]](value[1])
    return accept_array(kind, value)


encode = msgspec.msgpack.Encoder(enc_hook=_encode_custom).encode
"""Encodes the messages to and from these processes, and the values of preparers."""


_NOTHING: Final = msgspec.Raw(encode(None))


class Setup(msgspec.Struct, frozen=True):
    """The first message to a process."""

    config: EngineConfig
    names: tuple[str, ...]
    info: EngineInfo
    folders: Folders


class Task(msgspec.Struct, frozen=True):
    """The head of every other message; the body follows."""

    preparer: str
    further: list[Any]
    reports_unknown: bool


class Refusal(msgspec.Struct, frozen=True):
    """The parts of an ApiError."""

    status: int
    message: str
    param: str | None
    code: str | None


class Prepared(msgspec.Struct, frozen=True):
    """The answer to a task."""

    value: msgspec.Raw = _NOTHING
    """The value that the preparer has returned, encoded."""
    ignored: list[str] = []
    refusal: Refusal | None = None
    """The error that it has raised instead."""
    defect: str = ""
    """The type and the place of another exception, without its message: that may quote the request."""
    is_last: bool = False
    """The process ends now."""


_decode_answer = msgspec.msgpack.Decoder(Prepared).decode


class LargeRequests:
    """Makes large requests ready. The first process starts with the first of them."""

    def __init__(self, setup: Setup, budget: BodyBudget) -> None:
        self._pool = HelperPool(
            "preparing_process",
            COMMAND,
            encode(setup),
            most=MAX_PROCESSES,
            max_answer_bytes=_MAX_ANSWER_BYTES,
        )
        self._budget = budget

    async def prepare(
        self, preparer: Preparer[V], preparation: Preparation, body: bytes | bytearray, further: Sequence[Any]
    ) -> V:
        """Return what the preparer returns. Raises what it raises, a 503, and ClientGoneError."""
        head = encode(Task(preparer.name, list(further), preparation.reports_unknown))
        num_bytes = len(head) + len(body)
        self._budget.take(num_bytes)  # while it waits for its turn, too
        try:
            prepared = await self._ask(preparation, (LENGTH.pack(len(head)), head, body))
        except (HelperNotStartedError, HelperDiedError) as error:
            if preparation.asker.is_gone:
                raise ClientGoneError("the client closed the connection") from error
            raise _explain(error, num_bytes) from error
        finally:
            self._budget.give_back(num_bytes)
        preparation.note(prepared.ignored)
        if prepared.refusal is not None:
            refusal = prepared.refusal
            raise ApiError(refusal.status, refusal.message, param=refusal.param, code=refusal.code)
        if prepared.defect:
            logger.error("event=preparation_failed error=%s", prepared.defect)
            raise RuntimeError("the process that prepares large requests has failed")
        return preparer.decode(prepared.value)

    async def _ask(self, preparation: Preparation, parts: Sequence[bytes | bytearray]) -> Prepared:
        async with self._pool.one() as helper:
            if preparation.asker.is_gone:
                raise ClientGoneError("the client closed the connection")
            answer = await helper.ask(parts, ANSWER_S)
            try:
                prepared = _decode_answer(answer)
            except msgspec.DecodeError as error:
                raise HelperDiedError from error
            helper.is_spent = prepared.is_last
            return prepared


def _explain(error: HelperNotStartedError | HelperDiedError, num_bytes: int) -> ApiError:
    """Return the answer to a request that the process for it did not make ready."""
    if isinstance(error, HelperNotStartedError):
        return unavailable("Large requests cannot be taken now.", error.retry_after_s)
    if isinstance(error, HelperLateError):
        logger.warning("event=preparation_late bytes=%d", num_bytes)
        return invalid(None, "The request takes too much time to check. Make it smaller.", "too_complex")
    logger.warning("event=preparation_lost bytes=%d", num_bytes)
    return unavailable("The process that checks large requests was lost.")
