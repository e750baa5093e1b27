"""Has large requests made ready by a process of their own, so that the event loop goes on meanwhile.

Owns: which requests are large, and those processes. A thread would not do: decoding, checking and rendering hold the
interpreter lock. Whatever is done there is the same function that makes small requests ready here; it comes back as
its value, or as the refusal that it raised.
"""

from __future__ import annotations

import logging
import pickle
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from toka_engine.config import EngineConfig
from toka_engine.messages import EngineInfo
from toka_engine.server.engine import Folders
from toka_engine.server.errors import ApiError, ClientGoneError, invalid, unavailable
from toka_engine.server.exchange import BodyBudget
from toka_engine.server.helpers import LENGTH, HelperDiedError, HelperLateError, HelperNotStartedError, HelperPool
from toka_engine.server.preparation import Preparation

logger = logging.getLogger("toka.server")

COMMAND = (sys.executable, "-m", "toka_engine.server.preparing")
LARGE_BYTES = 64 * 1024
"""The size from which a request is large: what is below takes the event loop a few milliseconds at most."""
MAX_PROCESSES = 1
"""One makes prompts ready faster than an engine computes them; a start takes longer than the usual wait for it."""
ANSWER_S = 30.0
"""Wall time for one request."""
_MAX_ANSWER_BYTES = (1 << 32) - 1

Prepare: TypeAlias = Callable[..., Awaitable[Any]]
"""A function of a module that takes a Preparation, a body, and whatever else, which can be pickled as its value can."""


class Setup(NamedTuple):
    """The first message to a process."""

    config: EngineConfig
    names: tuple[str, ...]
    info: EngineInfo
    folders: Folders


class Task(NamedTuple):
    """The head of every other message; the body follows."""

    prepare: Prepare
    further: Sequence[Any]
    reports_unknown: bool


class Prepared(NamedTuple):
    """The answer to a task."""

    value: Any
    """What the function has returned, if it did."""
    ignored: list[str]
    refusal: tuple[int, str, dict[str, Any]] | None = None
    """The parts of the ApiError that it has raised, if it did."""
    defect: str = ""
    """The traceback of another exception."""
    is_last: bool = False
    """The process ends now."""


class LargeRequests:
    """Makes large requests ready. The first process starts with the first of them."""

    def __init__(self, setup: Setup, budget: BodyBudget) -> None:
        self._pool = HelperPool(
            "preparing_process",
            COMMAND,
            pickle.dumps(setup),
            most=MAX_PROCESSES,
            max_answer_bytes=_MAX_ANSWER_BYTES,
        )
        self._budget = budget

    async def prepare(
        self, prepare: Prepare, preparation: Preparation, body: bytes | bytearray, further: Sequence[Any]
    ) -> Any:
        """Return what `prepare` returns. Raises what it raises, a 503, and ClientGoneError."""
        head = pickle.dumps(Task(prepare, further, preparation.reports_unknown))
        num_bytes = len(head) + len(body)
        self._budget.take(num_bytes)  # while it waits for its turn, too
        try:
            prepared = await self._ask(preparation, (LENGTH.pack(len(head)), head, body))
        except HelperNotStartedError as error:
            raise unavailable("Large requests cannot be taken now.") from error
        except HelperLateError as error:
            logger.warning("event=preparation_late bytes=%d", num_bytes)
            raise invalid(None, "The request takes too much time to check. Make it smaller.", "too_complex") from error
        except HelperDiedError as error:
            logger.warning("event=preparation_lost bytes=%d", num_bytes)
            raise unavailable("The process that checks large requests was lost.") from error
        finally:
            self._budget.give_back(num_bytes)
        preparation.note(prepared.ignored)
        if prepared.refusal is not None:
            status, message, rest = prepared.refusal
            raise ApiError(status, message, **rest)
        if prepared.defect:
            raise RuntimeError(f"in the process that prepares large requests:\n{prepared.defect}")
        return prepared.value

    async def _ask(self, preparation: Preparation, parts: Sequence[bytes | bytearray]) -> Prepared:
        async with self._pool.one() as helper:
            if preparation.asker.is_gone:
                raise ClientGoneError("the client closed the connection")
            prepared: Prepared = pickle.loads(await helper.ask(parts, ANSWER_S))
            helper.is_spent = prepared.is_last
            return prepared
