"""The file of API keys: its form, and what is wrong with one.

The file is either one key on a line, or a JSON object {"keys": [...]} of keys with names and limits. An error names the
line or the field and never quotes a value, because the value may be a key.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from toka_engine.errors import ConfigError

KEY_VARIABLE = "TOKA_API_KEY"
SETTING = "api_keys_file"
ONLY_NAME = "default"
"""The name of a key that stands alone, in the environment or in a file."""
MAX_KEYS = 1000
"""The most keys of one file: each has its own series in /metrics."""
_MAX_FILE_BYTES = 1024 * 1024
_MAX_KEY_LENGTH = 1024
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_NAME_RULE = "must be 1 to 64 of the characters A-Z a-z 0-9 . _ @ - and begin with a letter or digit"
_PATH = re.compile(r" - at `\$\.?([^`]*)`$")
_LIMIT = Meta(ge=1, le=2**31 - 1)


class ApiKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A key, its name, and what may be done with it."""

    name: str
    key: str
    owner: str | None = None
    """Whose files, batches and responses its requests see; None: those of its name."""
    max_requests: Annotated[int, _LIMIT] | None = None
    """Requests that generate at once."""
    max_tokens_per_minute: Annotated[int, _LIMIT] | None = None


class _KeyDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: list[ApiKey]


class KeyFileError(ConfigError):
    """The file of keys cannot be read or is wrong."""


def read_variable(value: str | None) -> tuple[ApiKey, ...]:
    """Return the key of the environment variable; nothing where it is unset or empty. Raises ConfigError."""
    if not value:
        return ()
    if fault := _find_fault(value):
        raise ConfigError(f"{KEY_VARIABLE}: the key {fault}")
    return (ApiKey(name=ONLY_NAME, key=value),)


class KeySource:
    """The file as it was seen last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, ...] | None = None

    def read_if_changed(self) -> tuple[ApiKey, ...] | None:
        """Return the keys if the file is not the one seen last, also behind a link; None where it is. Raises
        KeyFileError, once for each state of the file.
        """
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe does not hold us up
            try:
                return self._read(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            if self._seen == ():
                return None
            self._seen = ()
            raise _fault(str(self.path), f"cannot be read: {error.strerror}") from error

    def _read(self, descriptor: int) -> tuple[ApiKey, ...] | None:
        status = os.fstat(descriptor)
        seen = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if seen == self._seen:
            return None
        self._seen = seen
        _check_status(self.path, status)
        with open(descriptor, "rb", closefd=False) as file:
            return parse_keys(file.read(_MAX_FILE_BYTES + 1), str(self.path))

    @property
    def is_readable_by_all(self) -> bool:
        """Whether every user of the machine may read the keys."""
        try:
            return bool(self.path.stat().st_mode & stat.S_IROTH)
        except OSError:
            return False


def parse_keys(data: bytes, path: str) -> tuple[ApiKey, ...]:
    """Return the keys that a file has. Raises KeyFileError."""
    if len(data) > _MAX_FILE_BYTES:
        raise _fault(path, f"has more than {_MAX_FILE_BYTES} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _fault(path, f"line {line} is not UTF-8") from None
    if not text.strip():
        raise _fault(path, "is empty")
    if text.lstrip().startswith(("{", "[")):
        return _check_keys(_decode_document(text, path), path)
    if len(text.strip("\r\n").splitlines()) > 1:
        raise _fault(path, 'must be one key on one line, or a JSON object {"keys": [{"name": ..., "key": ...}]}')
    key = text.strip("\r\n")
    if fault := _find_fault(key):
        raise _fault(path, f"the key {fault}")
    return (ApiKey(name=ONLY_NAME, key=key),)


def _decode_document(text: str, path: str) -> list[ApiKey]:
    try:
        document = json.loads(text, object_pairs_hook=_without_repetition)
    except json.JSONDecodeError as error:
        raise _fault(path, f"line {error.lineno}, column {error.colno} is no JSON: {error.msg}") from None
    except _RepeatedFieldError as error:
        raise _fault(path, f"an object has {error} twice") from None
    except (RecursionError, ValueError):
        raise _fault(path, "is nested too deep, or has a number that is too long") from None
    try:
        return msgspec.convert(document, _KeyDocument).keys
    except msgspec.ValidationError as error:
        message = str(error)
        found = _PATH.search(message)
        place = f"{found[1]}: " if found and found[1] else ""
        if "unknown field" in message:  # without its name, which may be a key that stands in the wrong place
            known = ApiKey if place else _KeyDocument
            message = f"has an unknown field; its fields are {', '.join(known.__struct_fields__)}"
        raise _fault(path, place + _PATH.sub("", message)) from None


class _RepeatedFieldError(Exception):
    """An object of the file has a field twice, of which one would be lost."""


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise _RepeatedFieldError(f"the field {name!r}" if name in ApiKey.__struct_fields__ else "a field")
        fields[name] = value
    return fields


def _check_keys(keys: list[ApiKey], path: str) -> tuple[ApiKey, ...]:
    if not keys:
        raise _fault(path, "keys: there is none, so that nobody could ask for anything")
    if len(keys) > MAX_KEYS:
        raise _fault(path, f"keys: there are {len(keys)}, more than {MAX_KEYS}")
    places: dict[tuple[str, str], int] = {}
    for index, entry in enumerate(keys):
        place = f"keys[{index}]"
        if not _NAME.fullmatch(entry.name):
            raise _fault(path, f"{place}.name: {_NAME_RULE}")
        if entry.owner is not None and not _NAME.fullmatch(entry.owner):
            raise _fault(path, f"{place}.owner: {_NAME_RULE}")
        if fault := _find_fault(entry.key):
            raise _fault(path, f"{place}.key: {fault}")
        for field, value in (("name", entry.name), ("key", entry.key)):
            first = places.setdefault((field, value), index)
            if first != index:
                raise _fault(path, f"{place}.{field}: it is the {field} of keys[{first}] too")
    return tuple(keys)


def _find_fault(key: str) -> str:
    """Return what is wrong with a key: an empty one would let everybody in, others no header can carry."""
    if not key:
        return "is empty"
    if len(key) > _MAX_KEY_LENGTH:
        return f"has more than {_MAX_KEY_LENGTH} characters"
    if any(char.isspace() or not char.isprintable() for char in key):
        return "has a space or a character that cannot be printed"
    return ""


def _check_status(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _fault(str(path), "is no file")
    if status.st_mode & stat.S_IWOTH:
        mode = stat.S_IMODE(status.st_mode)
        raise _fault(str(path), f"can be written by every user (mode {mode:04o}): whoever does adds a key")


def _fault(path: str, message: str) -> KeyFileError:
    return KeyFileError(f"{SETTING} {path}: {message}")
