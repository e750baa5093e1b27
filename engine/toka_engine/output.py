"""Decides what becomes of a process when nobody reads its output any more, as in `toka --help | head`.

A command ends at once and without a word, as programs do that SIGPIPE ends (`run_command`). A process that serves goes
on and loses its log (`outlive_reader`). Python does neither: it ignores SIGPIPE, which would end a process for a
connection that a client closed, too, and raises BrokenPipeError wherever something is printed, at its own end included.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

_READER_GONE = 141
"""The exit code that a shell reports for a program that SIGPIPE has ended."""
_HELP = frozenset(("--help", "-h"))


class _PipeEnd(io.FileIO):
    """A standard stream that knows what to do when its reader is gone; afterwards its output goes nowhere."""

    def __init__(self, fd: int, on_reader_gone: Callable[[], None]) -> None:
        super().__init__(fd, "w", closefd=False)
        self._on_reader_gone = on_reader_gone

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # the interpreter flushes once more when it ends
            os.close(nowhere)
            self._on_reader_gone()
            return len(memoryview(data).cast("B"))


def run_command(main: Callable[[], int | None], help_text: str | None = None) -> NoReturn:
    """Run `main` as this process and end with the code that it returns; quietly, when the output's reader goes.

    `help_text` is printed instead for --help, by commands that do not parse it themselves.
    """
    _wrap_standard_streams(_end)
    code: int | None = 0
    if help_text is not None and _HELP & {*sys.argv[1:]}:
        print(help_text.strip())
    else:
        code = main()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    sys.exit(code)


def outlive_reader() -> None:
    """Let this process go on when nobody reads its log any more."""
    _wrap_standard_streams(lambda: None)


def _end() -> NoReturn:
    raise SystemExit(_READER_GONE)


def _wrap_standard_streams(on_reader_gone: Callable[[], None]) -> None:
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            fd = stream.fileno()
        except (AttributeError, OSError):
            continue  # closed, or no file: a test's
        stream.flush()
        raw = _PipeEnd(fd, on_reader_gone)
        is_unbuffered = name == "stderr"
        wrapped = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=is_unbuffered or stream.line_buffering,
            write_through=is_unbuffered,
        )
        setattr(sys, name, wrapped)
