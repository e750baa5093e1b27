"""The errors of generations that the engine could not finish, by finish reason."""

from __future__ import annotations

from toka_engine.messages import FINISH_ERROR, FINISH_GRAMMAR
from toka_engine.server.errors import ApiError


def _not_finite() -> ApiError:
    return ApiError(500, "The model produced non-finite values (NaN or infinity) for this request.", code="not_finite")


def _grammar_failed() -> ApiError:
    message = "The output could not be made to follow the request's grammar: it takes too much work, or has a dead end."
    return ApiError(500, message, code="grammar_failed", headers=((b"x-should-retry", b"false"),))


FAILURES = {FINISH_ERROR: _not_finite, FINISH_GRAMMAR: _grammar_failed}
