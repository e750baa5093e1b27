"""Decodes a request's raw body into its endpoint's struct, and names the field in which it is wrong.

A body that the struct takes as it is costs one pass of the decoder. Only a body that it refuses is looked at again: a
field that is null, or known and neutral, is taken for absent (`fields`), and what is left is decoded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable
from operator import attrgetter
from typing import Any, Generic, TypeVar

import msgspec

from toka_engine.server.errors import ApiError, invalid
from toka_engine.server.fields import HINTS, given_hints, refuse_unknown, sort_fields

R = TypeVar("R")
T = TypeVar("T")

_PATH = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_NAMED = re.compile(r"(?P<kind>unknown|missing required) field `(?P<name>[^`]*)`")
_BOUND = re.compile(r"^Expected `(int|float)` [<>]=? ")
_STARTS = (
    (b"\xef\xbb\xbf", "it begins with a byte order mark (BOM), which has to go"),
    (b"\xff\xfe", "it is UTF-16 or UTF-32"),
    (b"\xfe\xff", "it is UTF-16"),
    (b"\x00\x00\xfe\xff", "it is UTF-32"),
    (b"\x1f\x8b", "it is compressed (gzip)"),
    (b"\x78\x01", "it is compressed (deflate)"),
    (b"\x78\x9c", "it is compressed (deflate)"),
    (b"\x78\xda", "it is compressed (deflate)"),
    (b"\x28\xb5\x2f\xfd", "it is compressed (zstd)"),
)
"""The first bytes of bodies that are often sent in place of JSON in UTF-8, and what they are."""
MAX_TOOLS_BYTES = 2 * 1024 * 1024
"""The most bytes that a request's `tools` may have as JSON. Their characters are counted once they are decoded."""
_MAX_MESSAGE = 200
"""The most characters of a message of the decoder, which may quote the value."""
_EXPLAINED_BODY_BYTES = 64 * 1024
"""The size up to which a body that is not JSON is searched for the field's name."""


_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class BodyDecoder(Generic[R]):
    """Decodes the raw body of one endpoint."""

    def __init__(self, request_type: type[R], effective: Collection[str] = ()) -> None:
        """`effective`: the fields that are hints elsewhere, and have an effect at this endpoint."""
        self._has_tools = "tools" in request_type.__struct_fields__  # type: ignore[attr-defined]
        self._decoder = msgspec.json.Decoder(request_type)
        self._fields = {field.encode_name: field for field in msgspec.inspect.type_info(request_type).fields}  # type: ignore[attr-defined]
        self._hints = tuple(name for name in self._fields if name in HINTS and name not in effective)
        self._hints_of = attrgetter(*self._hints) if len(self._hints) > 1 else None
        self._no_hints = (None,) * len(self._hints)

    def decode(self, body: bytes | bytearray, *, reports_unknown: bool = False) -> tuple[R, list[str]]:
        """Return the request, and the names of its fields that have no effect; unknown ones are refused unless they are
        to be reported. Raises a 400 that names the field, or says why the body is not JSON.
        """
        ignored: list[str] = []
        try:
            if self._has_tools and len(body) > MAX_TOOLS_BYTES:
                _check_size(_decode_object(body), "tools", MAX_TOOLS_BYTES)
            try:
                request = self._decoder.decode(body)
            except msgspec.ValidationError as error:
                kept, ignored = self._leave_out_absent(body, error, reports_unknown)
                request = self._decoder.decode(kept)
        except msgspec.ValidationError as error:
            raise self._mistyped(str(error)) from error
        except RecursionError as error:
            raise invalid(None, "The body is nested too deeply.") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _not_json(body, str(error)) from error
        if self._hints_of is not None and self._hints_of(request) == self._no_hints:
            return request, ignored
        return request, given_hints(request, self._hints) + ignored  # type: ignore[arg-type]

    def _leave_out_absent(
        self, body: bytes | bytearray, error: msgspec.ValidationError, reports_unknown: bool
    ) -> tuple[bytes, list[str]]:
        """Return `body` without the fields that are absent by their values, and those of them that are reported."""
        parts = _decode_object(body)
        kept, reported = sort_fields(parts, self._fields, reports_unknown=reports_unknown)
        if len(kept) == len(parts):
            raise error
        return msgspec.json.encode(kept), reported

    def _mistyped(self, message: str) -> ApiError:
        found = _PATH.search(message)
        field = self._fields.get(found["path"]) if found else None
        if field is not None and _BOUND.match(message):
            return invalid(field.name, f"'{field.name}' must be {_range(field.type)}.", "invalid_value")
        if field is not None and message.startswith("Invalid enum value "):  # which the message would repeat
            wanted = ", ".join(map(str, _choices(field.type)))
            return invalid(field.name, f"'{field.name}' must be one of {wanted}.", "invalid_value")
        return _mistyped(message, known=self._fields if found is None else ())


def _check_size(parts: dict[str, msgspec.Raw], name: str, most: int) -> None:
    """Refuse a field whose JSON is too large before objects are made of it, which takes much more time and memory."""
    raw = parts.get(name)
    if raw is not None and memoryview(raw).nbytes > most:
        raise invalid(name, f"'{name}' has more than {most} bytes of JSON.", "invalid_value")


def _range(kind: msgspec.inspect.Type) -> str:
    """Return the bounds of a field's number, in words."""
    match kind:
        case msgspec.inspect.Metadata():
            return _range(kind.type)
        case msgspec.inspect.UnionType():
            return next(filter(None, map(_range, kind.types)), "")
        case msgspec.inspect.IntType() | msgspec.inspect.FloatType():
            low, high = _plain(kind.ge), _plain(kind.le)
            return f"from {low} to {high}" if low and high else f"at least {low}" if low else f"at most {high}"
    return ""


def _plain(bound: float | None) -> str:
    return "" if bound is None else f"{bound:g}" if isinstance(bound, float) else str(bound)


def decode_part(decode: Callable[[msgspec.Raw], T], raw: msgspec.Raw, name: str) -> T:
    """Decode field `name`, which the body's decoder has skipped. Raises a 400 that names it."""
    try:
        return decode(raw)
    except msgspec.ValidationError as error:
        raise _mistyped(str(error), name) from error
    except RecursionError as error:
        raise invalid(name, f"'{name}' is nested too deeply.", "invalid_value") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(name, f"Invalid value for '{name}': {error}.", "invalid_json") from error


def _mistyped(message: str, prefix: str = "", known: Iterable[str] = ()) -> ApiError:
    found = _PATH.search(message)
    inner = found["path"] if found else ""
    path = prefix + ("." if prefix and inner and not inner.startswith("[") else "") + inner
    text = (message[: found.start()] if found else message)[:_MAX_MESSAGE]
    if named := _NAMED.search(message):
        if named["kind"] == "unknown":
            return refuse_unknown(named["name"], known, f"{path}." if path else "")
        path = f"{path}.{named['name']}" if path else named["name"]
        return invalid(path, f"Missing required field: '{path}'.", "missing_required_parameter")
    return invalid(path or None, f"Invalid value for '{path or 'body'}': {text}.", "invalid_type")


def _choices(kind: Any) -> tuple[Any, ...]:
    """Return the values that a field may have; none where they are not a few."""
    if isinstance(kind, msgspec.inspect.Metadata):
        return _choices(kind.type)
    if isinstance(kind, msgspec.inspect.UnionType):
        return tuple(value for each in kind.types for value in _choices(each))
    return kind.values if isinstance(kind, msgspec.inspect.LiteralType) else ()


def _not_json(body: bytes | bytearray, message: str) -> ApiError:
    """Say what the body is where that shows. Name the field where it is JSON but for a NaN, an infinity or half a
    surrogate pair.
    """
    for start, what in _STARTS:
        if body.startswith(start):
            return invalid(None, f"The body is no JSON in UTF-8: {what}.", "invalid_json")
    if b"\0" in body[:4]:
        return invalid(None, "The body is no JSON in UTF-8: it seems to be UTF-16 or UTF-32.", "invalid_json")
    if len(body) <= _EXPLAINED_BODY_BYTES:
        odd = object()
        try:
            value = json.loads(body, parse_constant=lambda _: odd)
        except (ValueError, RecursionError):
            value = None
        for name, part in value.items() if isinstance(value, dict) else ():
            if _contains(part, odd):
                return invalid(name, f"Invalid value for '{name}': NaN and infinity are not JSON.", "invalid_type")
            if not _is_text(part):
                return invalid(name, f"Invalid value for '{name}': half a surrogate pair.", "invalid_type")
    return invalid(None, f"The body is not valid JSON: {message}.", "invalid_json")


def _contains(value: Any, wanted: object) -> bool:
    if isinstance(value, (list, dict)):
        return any(_contains(item, wanted) for item in (value.values() if isinstance(value, dict) else value))
    return value is wanted


def _is_text(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True
