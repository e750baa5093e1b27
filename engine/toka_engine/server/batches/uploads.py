"""Receives an upload (multipart/form-data) straight into its file, however large it is.

Owns: which parts an upload may have, and their sizes. The parser is python-multipart's, fed as the body comes.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from toka_engine.server.errors import ApiError, invalid

_MAX_VALUE_BYTES = 256
_MAX_PARTS = 8
_MAX_NAME = 255
_WRITE_BYTES = 1024 * 1024
_MOST_BYTES_PER_S = 200e6
"""An upload takes no more, so that the server's thread has time for others' requests between its parts."""
_LEAST_PAUSE_S = 1e-3
_MOST_CREDIT_S = 5e-3
"""A pause that has lasted too long makes up for as much of later ones."""
_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Upload:
    """The parts of one upload as they come; the file's bytes go to `path`."""

    def __init__(self, content_type: bytes, path: Path, max_bytes: int) -> None:
        """Raises a 400 or 415 unless `content_type` is that of a form with files."""
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data":
            raise ApiError(415, "A file is sent as multipart/form-data.", code="unsupported_media_type")
        if not options.get(b"boundary"):
            raise invalid(None, "The content-type multipart/form-data has no boundary.", "invalid_multipart")
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._path = path
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._header_name, self._header_value = b"", b""
        self._disposition = b""
        self._part: str | None = None
        self._value = b""
        self._num_parts = 0
        self._is_over = False
        self._due_s = 0.0
        self._parser = MultipartParser(
            options[b"boundary"],
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )

    async def receive(self, parts: AsyncIterator[bytes]) -> None:
        """Take the whole body and sync the file. Raises ApiError; what the file has then is of no use."""
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            async for part in parts:
                try:
                    self._parser.write(part)
                except FormParserError as error:
                    raise invalid(None, "The body is no valid multipart/form-data.", "invalid_multipart") from error
                if self._held_bytes >= _WRITE_BYTES:
                    await asyncio.to_thread(self._write, fd)
                await self._pause(len(part))
            await asyncio.to_thread(self._write, fd)
            await asyncio.to_thread(os.fsync, fd)
        finally:
            os.close(fd)
        if not self._is_over:
            raise invalid(None, "The multipart/form-data ends before its last boundary.", "invalid_multipart")
        if self.filename is None:
            raise invalid("file", "Missing required field: 'file'.", "missing_required_parameter")

    async def _pause(self, num_bytes: int) -> None:
        """Wait until so many further bytes were due at the highest rate."""
        now_s = time.monotonic()
        self._due_s = max(self._due_s, now_s - _MOST_CREDIT_S) + num_bytes / _MOST_BYTES_PER_S
        if self._due_s - now_s > _LEAST_PAUSE_S:
            await asyncio.sleep(self._due_s - now_s)

    def _write(self, fd: int) -> None:
        held, self._held, self._held_bytes = self._held, [], 0
        for data in held:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]

    # ------------------------------------------------------------ the parser's callbacks

    def _on_part_begin(self) -> None:
        self._num_parts += 1
        if self._num_parts > _MAX_PARTS:
            raise invalid(None, f"The form has more than {_MAX_PARTS} parts.", "invalid_multipart")
        self._disposition = b""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name, self._header_value = b"", b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if name == "file":
            if self.filename is not None:
                raise invalid("file", "'file' is there twice.", "invalid_multipart")
            self.filename = clean_name(options.get(b"filename", b"").decode("utf-8", "replace"))
        elif name not in _FIELDS:
            raise invalid(name[:100], f"Unknown field: '{name[:100]}'.", "unknown_parameter")
        elif name in self.fields:
            raise invalid(name, f"'{name}' is there twice.", "invalid_multipart")
        self._part, self._value = name, b""

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._part == "file":
            self.num_bytes += end - start
            if self.num_bytes > self._max_bytes:
                message = f"The file has more than {self._max_bytes} bytes (`max_file_bytes`)."
                raise ApiError(413, message, param="file", code="file_too_large")
            self._held.append(data[start:end])
            self._held_bytes += end - start
        elif len(self._value) + end - start > _MAX_VALUE_BYTES:
            raise invalid(self._part, f"'{self._part}' is longer than {_MAX_VALUE_BYTES} bytes.")
        else:
            self._value += data[start:end]

    def _on_part_end(self) -> None:
        if self._part is not None and self._part != "file":
            self.fields[self._part] = self._value.decode("utf-8", "replace")
        self._part = None

    def _on_end(self) -> None:
        self._is_over = True


def clean_name(name: str) -> str:
    """Return a client's name for a file without folders and control characters; it is shown, never opened."""
    name = _CONTROL.sub("", name.replace("\\", "/")).rpartition("/")[2][:_MAX_NAME].strip()
    return name or "file"
