"""The server's answers to what clients get wrong and to what the engine cannot do, in OpenAI's error shape.

Owns: the mapping of an error to status, type, code and headers. Everything that refuses a request raises
`ApiError`; `failures` is the one place that turns it into an answer.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Sequence

import msgspec

from toka_engine.errors import TokaError

_TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}
_NO_RETRY = (b"x-should-retry", b"false")
"""Tells OpenAI's clients, which try every 5xx again, that the same request would fail the same way."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


class ErrorBody(msgspec.Struct, frozen=True):
    """An error as clients read it; `param` names the field that is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(msgspec.Struct, frozen=True):
    """The body of every answer other than success."""

    error: ErrorBody


class ApiError(TokaError):
    """An answer other than success; `param` names the offending field of the request."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = (*headers, _NO_RETRY) if status == 500 else headers

    def body(self) -> bytes:
        """Return the error as JSON: {"error": {message, type, param, code}}."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return msgspec.json.encode(ErrorAnswer(ErrorBody(self.message, kind, self.param, self.code)))


class ClientGoneError(TokaError):
    """The connection closed before the answer was complete: there is nobody to answer."""


def invalid(param: str | None, message: str, code: str | None = None) -> ApiError:
    """Return a 400 that names the field `param`."""
    return ApiError(400, message, param=param, code=code)


def mistyped(param: str, wanted: str) -> ApiError:
    """Return the 400 of a value of another type than `wanted`, in words."""
    return invalid(param, f"Invalid value for '{param}': it must be {wanted}.", "invalid_type")


def no_model(name: str, served: Sequence[str]) -> ApiError:
    """Return the 404 of a model that is not served, which names those that are."""
    shown = name if len(name) <= 100 else name[:100] + "..."
    others = ", ".join(f"'{other[:100]}'" for other in served[:10])
    message = f"The model '{shown}' does not exist. This server has {others}."
    return ApiError(404, message, param="model", code="model_not_found")


def internal() -> ApiError:
    """Return the 500 of a defect of ours. The log describes the defect, the answer does not."""
    return ApiError(500, "The server failed on this request; its log says why.", code="internal_error")


def no_room(message: str) -> ApiError:
    """Return the 507 of a disk or an owner's share that is full."""
    return ApiError(507, message, code="insufficient_storage")


def is_full(error: BaseException) -> bool:
    """Tell whether `error` says that the disk, or a quota, is full."""
    return isinstance(error, OSError) and error.errno in _FULL


def unavailable(message: str, retry_after_s: float = 1.0) -> ApiError:
    """Return a 503 that asks the client to retry, in whole seconds from one on."""
    wait = b"%d" % max(1, math.ceil(retry_after_s))
    return ApiError(503, message, code="unavailable", headers=((b"retry-after", wait),))
