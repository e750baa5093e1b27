"""The result files of a running batch: lines are appended and synced before the database says that they count."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from toka_engine.server.batches.records import BatchUsage, CachedTokens, ReasoningTokens
from toka_engine.server.request import Usage


class LineResult(msgspec.Struct, frozen=True, kw_only=True):
    """One answered line, as it stands in a result file."""

    number: int
    is_success: bool
    data: bytes
    usage: Usage | None = None
    """The tokens that it took; None for a line that was refused or not run."""


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


def add_usage(sums: BatchUsage, results: list[LineResult]) -> BatchUsage:
    """Return `sums` with the tokens of `results`."""
    usages = [result.usage for result in results if result.usage is not None]
    num_input = sums.input_tokens + sum(usage.prompt_tokens for usage in usages)
    num_output = sums.output_tokens + sum(usage.completion_tokens for usage in usages)
    num_cached = sum(usage.prompt_tokens_details.cached_tokens for usage in usages)
    num_reasoning = sum(
        details.reasoning_tokens
        for usage in usages
        if (details := usage.completion_tokens_details) is not msgspec.UNSET
    )
    return BatchUsage(
        input_tokens=num_input,
        output_tokens=num_output,
        total_tokens=num_input + num_output,
        input_tokens_details=CachedTokens(sums.input_tokens_details.cached_tokens + num_cached),
        output_tokens_details=ReasoningTokens(sums.output_tokens_details.reasoning_tokens + num_reasoning),
    )
