"""The server's end of its link to the manager, in the event loop. No policy: messages go to a callback, in
order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from toka_engine.channel import Channel
from toka_engine.errors import PeerClosedError
from toka_engine.messages import EngineInfo, ManagerToServer


class ManagerLink:
    """Reads when there is something, writes what the socket did not take when it can."""

    def __init__(self, fd: int, on_message: Callable[[ManagerToServer], None], on_closed: Callable[[], None]) -> None:
        self._channel: Channel[EngineInfo] = Channel.from_fd(fd, ManagerToServer)
        self._on_message = on_message
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._is_writing = False
        self._is_closed = False
        self._readable = asyncio.Event()
        self._loop.add_reader(self._channel.fileno(), self._readable.set)

    def send(self, message: msgspec.Struct) -> None:
        """Send, or drop the message where the manager is gone: `on_closed` has told everybody."""
        if self._is_closed:
            return
        try:
            self._channel.send(message)
        except PeerClosedError:
            self._close()
            return
        if self._channel.has_unsent and not self._is_writing:
            self._is_writing = True
            self._loop.add_writer(self._channel.fileno(), self._write)

    async def run(self) -> None:
        """Hand out messages until the manager is gone. Raises what `on_message` raises, and MessageError."""
        while True:
            await self._readable.wait()
            self._readable.clear()
            if self._is_closed:
                return
            try:
                messages = self._channel.receive_ready()
            except PeerClosedError:
                self._close()
                return
            for message in messages:
                self._on_message(message)

    def _write(self) -> None:
        try:
            self._channel.flush()
        except PeerClosedError:
            self._close()
            return
        if not self._channel.has_unsent:
            self._is_writing = False
            self._loop.remove_writer(self._channel.fileno())

    def _close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._loop.remove_reader(self._channel.fileno())
        self._loop.remove_writer(self._channel.fileno())
        self._channel.close()
        self._readable.set()
        self._on_closed()
