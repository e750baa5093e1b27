"""Framed messages over an inherited Unix socket pair. No policy: who talks when is up to the owners.

A frame is a little-endian uint32 length and that many bytes of `codec`. A channel never blocks in `send`: what the
socket does not take is kept and goes out with the next `send`, `flush` or `wait`.

Writing (`send`, `flush`, and the part of `wait` that writes) may be done by any threads at once: frames never mix, and
those of one thread stay in order. Reading (`receive`, `receive_ready`) belongs to one thread at a time, and `close` to
the owner when no other thread uses the channel. A `wait` that has begun does not learn of bytes that another thread
leaves unsent meanwhile. `send` must not be called from a signal handler: it may have interrupted the lock's holder.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypeVar

import msgspec

from toka_engine.codec import Decoder, encode
from toka_engine.errors import MessageError, PeerClosedError

T = TypeVar("T")

_LENGTH = struct.Struct("<I")
_MAX_FRAME_BYTES = 1 << 30
_READ_BYTES = 1 << 20
_SOCKET_BUFFER_BYTES = 4 << 20


class Channel(Generic[T]):
    """One end of a link; `T` is the union of messages that arrive at this end."""

    def __init__(self, sock: socket.socket, incoming: Any) -> None:
        sock.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)
        self._socket = sock
        self._decoder: Decoder[T] = Decoder(incoming)
        self._unsent: deque[memoryview] = deque()
        self._write_lock = threading.Lock()
        self._received = bytearray()
        self._is_peer_closed = False

    @classmethod
    def from_fd(cls, fd: int, incoming: Any) -> Channel[T]:
        """Take over the inherited file descriptor `fd`."""
        return cls(socket.socket(fileno=fd), incoming)

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    def send(self, message: msgspec.Struct) -> None:
        """Queue `message` and write what the socket takes. Raises PeerClosedError."""
        self.send_frame(make_frame(message))

    def send_frame(self, frame: bytes) -> None:
        """Queue a frame of `make_frame` and write what the socket takes. Raises PeerClosedError."""
        with self._write_lock:
            self._unsent.append(memoryview(frame))
            self._write_unsent()

    def flush(self) -> None:
        """Write what the socket takes of the unsent bytes, without waiting for it. Raises PeerClosedError."""
        with self._write_lock:
            self._write_unsent()

    def receive_ready(self) -> list[T]:
        """Return the messages that are here, without waiting.

        Raises PeerClosedError only after every message that arrived before the end has been returned.
        """
        self._read_socket()
        messages = self._take_frames()
        if self._is_peer_closed and not messages:
            raise PeerClosedError("the peer closed the channel")
        return messages

    def receive(self, timeout_s: float | None = None, beside: Sequence[Channel[Any]] = ()) -> list[T]:
        """Wait until at least one message is here and return all; [] after `timeout_s`.

        Meanwhile unsent bytes of the channels `beside`, on which nothing arrives, go out. Raises PeerClosedError, also
        when a peer of these has gone.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            if messages := self.receive_ready():
                return messages
            remaining = None if deadline is None else deadline - time.monotonic()
            if remaining is not None and remaining <= 0:
                return []
            for channel in wait([self, *beside], remaining):
                if channel is not self:
                    channel.receive_ready()

    def close(self) -> None:
        self._socket.close()

    def _write_unsent(self) -> None:
        """The caller holds the lock: two threads here would send the first part twice."""
        try:
            while self._unsent:
                part = self._unsent[0]
                sent = self._socket.send(part)
                if sent < len(part):
                    self._unsent[0] = part[sent:]
                else:
                    self._unsent.popleft()
        except BlockingIOError:
            return
        except (BrokenPipeError, ConnectionResetError) as error:
            raise PeerClosedError("the peer closed the channel") from error

    def _read_socket(self) -> None:
        while not self._is_peer_closed:
            try:
                data = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                return
            except ConnectionResetError:
                data = b""
            if not data:
                self._is_peer_closed = True
                return
            self._received += data

    def _take_frames(self) -> list[T]:
        messages: list[T] = []
        start = 0
        available = len(self._received)
        while available - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._received, start)
            if length > _MAX_FRAME_BYTES:
                raise MessageError(f"frame of {length} bytes")
            end = start + _LENGTH.size + length
            if end > available:
                break
            # A copy of its own, so that arrays decoded from it stay valid when the buffer is reused.
            messages.append(self._decoder.decode(bytes(memoryview(self._received)[start + _LENGTH.size : end])))
            start = end
        if start:
            del self._received[:start]
        return messages


def make_frame(message: msgspec.Struct) -> bytes:
    """Return `message` as it goes over a channel."""
    body = encode(message)
    return _LENGTH.pack(len(body)) + body


def broadcast(channels: Sequence[Channel[Any]], message: msgspec.Struct) -> None:
    """Send `message`, encoded once, over each of `channels`. Raises PeerClosedError."""
    frame = make_frame(message)
    for channel in channels:
        channel.send_frame(frame)


def wait(channels: Iterable[Channel[Any]], timeout_s: float | None) -> list[Channel[Any]]:
    """Wait until one of `channels` can be read, writing unsent bytes meanwhile; return those that can.

    Returns [] after `timeout_s`. Raises PeerClosedError when a write finds its peer gone.
    """
    poller = select.poll()
    by_fd = {channel.fileno(): channel for channel in channels}
    for fd, channel in by_fd.items():
        poller.register(fd, select.POLLIN | (select.POLLOUT if channel.has_unsent else 0))
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        remaining_ms = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1e3
        events = poller.poll(remaining_ms)
        readable = []
        for fd, event in events:
            channel = by_fd[fd]
            if event & select.POLLOUT:
                channel.flush()
                if not channel.has_unsent:
                    poller.modify(fd, select.POLLIN)
            if event & ~select.POLLOUT:
                readable.append(channel)
        if readable or (deadline is not None and time.monotonic() >= deadline):
            return readable


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """A connected pair for one link; each end goes to one process."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
