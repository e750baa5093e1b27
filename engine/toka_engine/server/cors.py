"""Cross-origin requests: which pages of other origins may read answers, by the key `cors_origins`.

Owns: the headers that tell a browser so, and the answer to its preflight. Without the key no page may. API keys
travel in the authorization header, never in cookies, so that no answer allows credentials.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

Headers = tuple[tuple[bytes, bytes], ...]

_EXPOSED = b"x-request-id, x-toka-ignored, retry-after, x-should-retry"
_METHODS = b"GET, POST, DELETE, OPTIONS"
_DEFAULT_REQUEST_HEADERS = b"authorization, content-type"
_MAX_AGE_S = b"600"
_HEADER_NAMES = re.compile(rb"[A-Za-z0-9_, -]{1,4096}")


class Origins:
    """The origins of the pages that may read answers."""

    def __init__(self, origins: Collection[str]) -> None:
        """`origins`: as browsers send them (https://example.org), or `*` for all."""
        self._allows_all = "*" in origins
        self._origins = frozenset(origin.encode() for origin in origins)

    def headers(self, request: Sequence[tuple[bytes, bytes]]) -> Headers:
        """Return what an answer to `request` says about origins; nothing where it has none, or none that may read."""
        if not self._origins:
            return ()
        origin = _find(request, b"origin")
        if origin is None:
            return () if self._allows_all else ((b"vary", b"origin"),)
        if self._allows_all:
            return (b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", _EXPOSED)
        if origin not in self._origins:
            return ((b"vary", b"origin"),)
        return (
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", _EXPOSED),
            (b"vary", b"origin"),
        )

    def preflight(self, method: str, request: Sequence[tuple[bytes, bytes]]) -> Headers | None:
        """Return the further headers of the answer to a preflight; None where `request` is none, or none is allowed."""
        if not self._origins or method != "OPTIONS" or _find(request, b"access-control-request-method") is None:
            return None
        wanted = _find(request, b"access-control-request-headers")
        allowed = wanted if wanted and _HEADER_NAMES.fullmatch(wanted) else _DEFAULT_REQUEST_HEADERS
        return (
            (b"access-control-allow-methods", _METHODS),
            (b"access-control-allow-headers", allowed),
            (b"access-control-max-age", _MAX_AGE_S),
        )


def _find(headers: Sequence[tuple[bytes, bytes]], wanted: bytes) -> bytes | None:
    return next((value for name, value in headers if name == wanted), None)
