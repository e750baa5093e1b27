"""The headers that every answer has, whoever writes it: `date` and `x-request-id`; and `x-toka-ignored`."""

from __future__ import annotations

import itertools
import re
import secrets
import time
from collections.abc import Iterable
from email.utils import formatdate

REQUEST_ID = b"x-request-id"
IGNORED = b"x-toka-ignored"
_ACCEPTED_ID = re.compile(rb"[A-Za-z0-9._~:/+=@-]{1,128}")
"""A client's own request id: whatever else it sends could forge a log line, or fill it."""
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.\[\]-]{1,64}")
"""A field's name that a header can carry as it is."""
_MAX_LISTED = 20
_process_id = secrets.token_hex(8)
_numbers = itertools.count()


class _Clock:
    """The value of the `date` header, made once a second."""

    def __init__(self) -> None:
        self._second = -1
        self._value = b""

    def now(self) -> bytes:
        second = int(time.time())
        if second != self._second:
            self._second, self._value = second, formatdate(second, usegmt=True).encode()
        return self._value


date = _Clock().now


def choose_request_id(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the client's own id of the request where it has a plain one, else a new one."""
    for name, value in headers:
        if name == REQUEST_ID and _ACCEPTED_ID.fullmatch(value):
            return value
    return f"req-{_process_id}-{next(_numbers):x}".encode()


def list_ignored(names: Iterable[str]) -> bytes:
    """Return the value of `x-toka-ignored`: each name once, those that a header cannot carry as `other`."""
    shown = dict.fromkeys(name if _PLAIN_NAME.fullmatch(name) else "other" for name in names)
    return ",".join([*shown][:_MAX_LISTED]).encode()
