"""The result files of a running batch: lines are appended and synced before the database says that they count."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from toka_engine.server.batches.records import BatchUsage


class LineResult(msgspec.Struct, frozen=True, kw_only=True):
    """One answered line, as it stands in a result file."""

    number: int
    is_success: bool
    data: bytes
    prompt_tokens: int = 0
    completion_tokens: int = 0


class ResultFile:
    """One of the two files. Its first `size` bytes count."""

    def __init__(self, path: Path, size: int) -> None:
        """Open `path` and cut what a crash left behind `size`. Raises OSError."""
        self.size = size
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._cut()

    def append(self, data: bytes) -> None:
        """Write and sync. Raises OSError, after which the file is as before."""
        if not data:
            return
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self._fd, memoryview(data)[written:], self.size + written)
            os.fsync(self._fd)
        except OSError:
            self._cut()
            raise
        self.size += len(data)

    def cut_to(self, size: int) -> None:
        """Take back what was appended beyond `size`, because the database could not note it."""
        self.size = size
        self._cut()

    def _cut(self) -> None:
        os.ftruncate(self._fd, self.size)

    def close(self) -> None:
        os.close(self._fd)


class DoneLines:
    """Which lines of a batch are answered, one bit each."""

    def __init__(self, num_lines: int, bits: bytes) -> None:
        size = (num_lines + 7) // 8
        self._bits = bytearray(bits.ljust(size, b"\0"))

    def __contains__(self, number: int) -> bool:
        return bool(self._bits[number >> 3] >> (number & 7) & 1)

    def add(self, number: int) -> None:
        self._bits[number >> 3] |= 1 << (number & 7)

    def to_bytes(self) -> bytes:
        return bytes(self._bits)


def add_usage(usage: BatchUsage, results: list[LineResult]) -> BatchUsage:
    """Return `usage` with the tokens of `results`."""
    num_input = usage.input_tokens + sum(result.prompt_tokens for result in results)
    num_output = usage.output_tokens + sum(result.completion_tokens for result in results)
    return msgspec.structs.replace(
        usage, input_tokens=num_input, output_tokens=num_output, total_tokens=num_input + num_output
    )
