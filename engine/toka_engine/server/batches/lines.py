"""The lines of a batch's input: reading them in blocks, and checking them before any is run.

All of this blocks and runs in threads; a block is small enough that the interpreter lock is free again soon.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from toka_engine.server.batches.records import BatchError

BLOCK_BYTES = 256 * 1024
MAX_ERRORS = 100
"""The number of faulty lines that a failed batch names."""
MAX_CUSTOM_ID = 512


class InputLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of a batch's input: a request, and the client's name for it."""

    custom_id: str
    method: Literal["POST"]
    url: str
    body: msgspec.Raw


class _Peek(msgspec.Struct, frozen=True):
    stream: bool | None = None
    model: str | None = None


class Numbered(NamedTuple):
    """A line without its end, and its number from 0; blank lines have none."""

    number: int
    data: bytes


class Findings(msgspec.Struct, kw_only=True):
    """The findings of a check of the whole input."""

    num_lines: int = 0
    errors: list[BatchError]
    model: str | None = None
    """The model that all lines name, if it is one."""


decode_line = msgspec.json.Decoder(InputLine).decode
_peek = msgspec.json.Decoder(_Peek).decode


class LineTooLongError(ValueError):
    """A line has more bytes than a request's body may have. `number` counts from 0."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def read_blocks(path: Path, max_line_bytes: int) -> Iterator[list[Numbered]]:
    """Yield the lines of `path` in blocks of about `BLOCK_BYTES`. Raises LineTooLongError."""
    number = 0
    with path.open("rb") as file:
        rest = b""
        while True:
            data = file.read(BLOCK_BYTES)
            parts = (rest + data).split(b"\n")
            rest = parts.pop() if data else b""
            block: list[Numbered] = []
            for part in parts:
                if stripped := part.strip():
                    if len(stripped) > max_line_bytes:
                        raise LineTooLongError(number)
                    block.append(Numbered(number, stripped))
                    number += 1
            if block:
                yield block
            if not data:
                return
            if len(rest) > max_line_bytes:
                raise LineTooLongError(number)


def check_lines(path: Path, endpoint: str, *, max_lines: int, max_line_bytes: int) -> Findings:
    """Check every line of a batch's input: its form, its url, that its name is its own, that it is not streamed."""
    findings = Findings(errors=[])
    names: set[str] = set()
    models: set[str | None] = set()
    try:
        for block in read_blocks(path, max_line_bytes):
            for line in block:
                findings.num_lines += 1
                if findings.num_lines > max_lines:
                    findings.errors.append(_fault("too_many_lines", f"A batch has at most {max_lines} lines."))
                    return findings
                error = _check_line(line, endpoint, names, models)
                if error is not None:
                    findings.errors.append(error)
                    if len(findings.errors) == MAX_ERRORS:
                        return findings
    except LineTooLongError as error:
        message = f"The line has more than {max_line_bytes} bytes."
        findings.errors.append(_fault("line_too_long", message, error.number))
    if not findings.num_lines:
        findings.errors.append(_fault("empty_file", "The file has no line."))
    if len(models) == 1:
        findings.model = models.pop()
    return findings


def _check_line(line: Numbered, endpoint: str, names: set[str], models: set[str | None]) -> BatchError | None:
    try:
        request = decode_line(line.data)
        peek = _peek(request.body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return _fault("invalid_json_line", f"The line is no request of a batch: {error}.", line.number)
    if request.url != endpoint:
        message = f"The line's url is '{request.url[:100]}'; this batch is of '{endpoint}'."
        return _fault("mismatched_url", message, line.number, "url")
    if not 0 < len(request.custom_id) <= MAX_CUSTOM_ID:
        message = f"custom_id must have 1 to {MAX_CUSTOM_ID} characters."
        return _fault("invalid_custom_id", message, line.number, "custom_id")
    if request.custom_id in names:
        message = f"The custom_id '{request.custom_id[:100]}' is another line's, too."
        return _fault("duplicate_custom_id", message, line.number, "custom_id")
    names.add(request.custom_id)
    if peek.stream:
        return _fault("stream_not_supported", "The lines of a batch cannot be streamed.", line.number, "body.stream")
    models.add(peek.model)
    return None


def _fault(code: str, message: str, number: int | None = None, param: str | None = None) -> BatchError:
    return BatchError(code=code, message=message, line=None if number is None else number + 1, param=param)
