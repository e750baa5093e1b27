"""Tells a client that is gone from one that has only finished sending (TCP half-close) and still reads.

Both look alike to the server: a FIN after the request. Only a write tells them apart, since a host answers data for a
closed socket with an RST. So while a half-closed connection waits for its answer, this watch sends what every client
must skip and looks for the RST: an interim response (`100 Continue`) before the answer, a comment between the events of
a stream. A client of HTTP/1.0 that waits for a whole answer may be sent neither; there TCP keep-alive finds out, about
a minute later.
"""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Callable

INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"
COMMENT = b":\n\n"
_FIRST_LOOK_S = 0.01
"""The delay of the first look, which an answer that is nearly done beats."""
_MAX_DELAY_S = 0.5
"""The longest delay between two looks; each is twice the one before."""
_PROBED_LOOKS = (0, 5, 8)
"""The looks that send a probe. More than one: a proxy in between passes a FIN on and meets the RST itself."""
_KEEP_ALIVE_S = 10


class HalfClosedWatch:
    """Looks at one half-closed connection until it is stopped or the client turns out to be gone."""

    def __init__(self, transport: asyncio.Transport, probe: Callable[[], bytes]) -> None:
        """`probe`: what may be sent now; empty where nothing may."""
        self._transport = transport
        self._probe = probe
        self._loop = asyncio.get_running_loop()
        self._num_looks = 0
        sock: socket.socket = transport.get_extra_info("socket")
        _keep_alive(sock)
        self._poll = select.poll()
        self._poll.register(sock.fileno(), 0)  # no event but errors and the end of both directions
        self._timer = self._loop.call_later(_FIRST_LOOK_S, self._look)

    def stop(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        if self._poll.poll(0):
            self._transport.abort()
            return
        if self._num_looks in _PROBED_LOOKS and (probe := self._probe()):
            self._transport.write(probe)
        self._num_looks += 1
        delay_s = min(_FIRST_LOOK_S * 2**self._num_looks, _MAX_DELAY_S)
        self._timer = self._loop.call_later(delay_s, self._look)


def _keep_alive(sock: socket.socket) -> None:
    """Have the kernel ask whether the peer's socket still exists."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", _KEEP_ALIVE_S), ("TCP_KEEPINTVL", _KEEP_ALIVE_S), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):  # not every system has all three
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
