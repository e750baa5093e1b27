"""Signals as a readable file descriptor, so that one poll waits for them and for everything else."""

from __future__ import annotations

import os
import signal
from types import TracebackType
from typing import Self

from toka_engine.portable import open_pipe


class SignalFd:
    """Turns signals into a readable file descriptor, so that one poll waits for everything.

    They are ignored afterwards: the process is at its end then, and a second SIGTERM must not change how it ends.
    """

    def __init__(self, *signums: signal.Signals) -> None:
        self._signums = signums
        self._read, self._write = open_pipe()

    def __enter__(self) -> Self:
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for signum in self._signums:
            # A handler must exist for the byte to be written; it has nothing to do itself.
            signal.signal(signum, lambda *_: None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum in self._signums:
            signal.signal(signum, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        os.close(self._read)
        os.close(self._write)

    def fileno(self) -> int:
        return self._read

    def take(self) -> list[int]:
        """The signals that have arrived, in order."""
        try:
            return list(os.read(self._read, 4096))
        except BlockingIOError:
            return []
