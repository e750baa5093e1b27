"""Ends a generation whose request gave it less time than it takes: `timeout_s` of its body, or a header."""

from __future__ import annotations

import asyncio
import time

import msgspec

from toka_engine.server.errors import ApiError
from toka_engine.server.generation_spec import GenerationSpec
from toka_engine.server.request import MAX_TIMEOUT_S
from toka_engine.server.streams import Generation

TIMEOUT_HEADER = b"x-request-timeout-ms"
"""Milliseconds for the whole answer, for whoever cannot change the body: a gateway, a client's fixed settings."""
_MOST_DIGITS = len(str(MAX_TIMEOUT_S * 1000))


def limit_by_header(spec: GenerationSpec, value: bytes | None) -> GenerationSpec:
    """Return `spec` with no more time than the `value` of TIMEOUT_HEADER says; None: there is no such header.

    Raises a 400 if it is no number of milliseconds from 1 to 86,400,000.
    """
    if value is None:
        return spec
    milliseconds = int(value) if value.isdigit() and len(value) <= _MOST_DIGITS else 0
    if not 0 < milliseconds <= MAX_TIMEOUT_S * 1000:
        name = TIMEOUT_HEADER.decode()
        message = f"The header '{name}' must be a number of milliseconds from 1 to {MAX_TIMEOUT_S * 1000}."
        raise ApiError(400, message, param=name)
    limit_s = milliseconds / 1000
    return msgspec.structs.replace(spec, timeout_s=min(spec.timeout_s or limit_s, limit_s))


def deduct_elapsed(spec: GenerationSpec, started_s: float) -> GenerationSpec:
    """Return `spec` with the time that is left to a request of `started_s`. Raises a 504 if there is none."""
    if not spec.timeout_s:
        return spec
    left_s = spec.timeout_s - (time.monotonic() - started_s)
    if left_s <= 0:
        raise _deadline_exceeded()
    return msgspec.structs.replace(spec, timeout_s=left_s)


def start_timer(generation: Generation) -> asyncio.TimerHandle | None:
    """End `generation` when its time is over, unless the timer is cancelled before; None: it has all the time."""
    timeout_s = generation.spec.timeout_s
    if not timeout_s:
        return None
    return asyncio.get_running_loop().call_later(timeout_s, generation.expire, _deadline_exceeded())


def _deadline_exceeded() -> ApiError:
    message = f"The request was not answered within its 'timeout_s', or its header '{TIMEOUT_HEADER.decode()}'."
    no_retry = ((b"x-should-retry", b"false"),)
    return ApiError(504, message, param="timeout_s", code="deadline_exceeded", headers=no_retry)
