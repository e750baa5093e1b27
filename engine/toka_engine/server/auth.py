"""The API key check of /v1/*. The key comes from the environment only, and is compared in constant time."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from toka_engine.server.errors import ApiError

KEY_VARIABLE = "TOKA_API_KEY"


class KeyCheck:
    """Checks the key of a request; accepts every request where no key is set."""

    def __init__(self, key: str | None) -> None:
        self._key = key.encode() if key else None

    def check(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Raise a 401 unless `headers` carry `Authorization: Bearer <the key>`, or the key as `x-api-key`, which
        Anthropic's clients send.
        """
        if self._key is None:
            return
        given = given_key(headers)
        if given is None:
            raise _denied("No API key was given: send it as `Authorization: Bearer <key>`.")
        if not hmac.compare_digest(given, self._key):
            raise _denied("The API key is wrong.")


def given_key(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """Return the key that `headers` carry, empty where the scheme is another; None where they carry none."""
    given = {name: value for name, value in headers if name in (b"authorization", b"x-api-key")}
    if not given:
        return None
    scheme, _, key = given.get(b"authorization", b"Bearer " + given.get(b"x-api-key", b"")).partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""


def _denied(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers=((b"www-authenticate", b"Bearer"),))
