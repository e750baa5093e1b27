"""Calls as Qwen 3 Coder writes them: a tag per function, and one per argument with its value as plain text.

The value of an argument that may only be a string is handed on while it comes; others are held until their end, and are
JSON if they read as such.
"""

from __future__ import annotations

import json
import re
from typing import Any

from toka_engine.server.calls.formats import CallReader
from toka_engine.server.calls.source import MAX_HELD, MAX_NAME, Marks, Parts, Source, Steps

_FUNCTION = "<function="
_TOOL_CALL = "<tool_call>"
_TOOL_CALL_END = "</tool_call>"
_NAME = re.compile(rf"(?P<name>[^<>=\s]{{1,{MAX_NAME}}})\s*>")
_NAME_BEGIN = re.compile(rf"[^<>=\s]{{0,{MAX_NAME}}}\s*")
_FUNCTION_HEAD = re.compile(rf"\s*{_FUNCTION}{_NAME.pattern}")
_FUNCTION_HEAD_BEGIN = re.compile(
    r"\s*(?:"
    + "|".join(re.escape(_FUNCTION[:end]) for end in range(len(_FUNCTION)))
    + rf"|{_FUNCTION}{_NAME_BEGIN.pattern})"
)
_VALUE_ENDS = Marks(("</parameter>", "<parameter=", "</function>", _TOOL_CALL_END))
_BETWEEN = Marks(("<parameter=", "</function>", _TOOL_CALL_END))
_LITERALS = {"True": "true", "False": "false", "None": "null"}


class XmlCalls(CallReader):
    """Reads `<tool_call><function=NAME><parameter=KEY>value</parameter></function></tool_call>`.

    The outer tag may lack.
    """

    marks = (_TOOL_CALL, _FUNCTION)

    def read(self, source: Source, parts: Parts, mark: str) -> Steps[bool]:
        if mark == _TOOL_CALL:
            head = yield from source.match(_FUNCTION_HEAD, _FUNCTION_HEAD_BEGIN)
        else:
            head = yield from source.match(_NAME, _NAME_BEGIN)
        if head is None:
            return False
        source.take(head.end())
        parts.call(head["name"])
        yield from self._read_arguments(source, parts, _properties(self._parameters.get(head["name"])))
        parts.end_call()
        yield from _skip_closing(source)
        return True

    def _read_arguments(self, source: Source, parts: Parts, properties: dict[str, Any]) -> Steps[None]:
        """Read up to the function's end, and write the arguments as one JSON object."""
        before = "{"
        while (yield from _find(source, _BETWEEN)) == "<parameter=":
            name = yield from source.match(_NAME, _NAME_BEGIN)
            if name is None:
                continue
            source.take(name.end())
            parts.arguments(f"{before}{_encode(name['name'])}: ")
            before = ", "
            if _types_of(properties.get(name["name"])) == {"string"}:
                is_closed = yield from _stream_text(source, parts)
            else:
                is_closed = yield from _read_value(source, parts, properties.get(name["name"]))
            if not is_closed:
                return
        parts.arguments("{}" if before == "{" else "}")


def _find(source: Source, marks: Marks) -> Steps[str | None]:
    """Drop the text up to the first of `marks`, take that, and return it; None at the end."""
    while True:
        if found := marks.search(source.text):
            source.take(found.end())
            return found[0]
        source.take(len(source.text) - marks.num_held(source.text))
        if source.is_ended:
            return None
        yield


def _stream_text(source: Source, parts: Parts) -> Steps[bool]:
    """Hand on a value as a JSON string while it comes, without the line breaks that the format puts around it. Return
    whether it has an end.
    """
    yield from _skip_line_break(source)
    parts.arguments('"')
    while True:
        found = _VALUE_ENDS.search(source.text)
        end = found.start() if found else len(source.text) - _VALUE_ENDS.num_held(source.text)
        text = source.text[:end]
        shown = text.removesuffix("\n")
        parts.arguments(_encode(shown)[1:-1])
        if found:
            _take_end(source, end, found[0])
            parts.arguments('"')
            return True
        source.take(len(shown))
        if source.is_ended:
            return False
        yield


def _read_value(source: Source, parts: Parts, schema: Any) -> Steps[bool]:
    """Hand on a value that is not known to be a string, once it is whole."""
    while True:
        found = _VALUE_ENDS.search(source.text)
        if found or source.is_ended:
            break
        yield
    if not found:
        return False
    text = source.text[: found.start()].removeprefix("\n").removesuffix("\n")
    _take_end(source, found.start(), found[0])
    parts.arguments(_as_json(text, _types_of(schema)))
    return True


def _take_end(source: Source, place: int, mark: str) -> None:
    """Take a value and its own end; another tag that ends it is left to be read."""
    source.take(place + (len(mark) if mark == "</parameter>" else 0))


def _skip_line_break(source: Source) -> Steps[None]:
    while not source.text and not source.is_ended:
        yield
    source.text = source.text.removeprefix("\n")


def _skip_closing(source: Source) -> Steps[None]:
    """Take the outer closing tag, if it comes next."""
    while True:
        rest = source.text.lstrip()
        if rest.startswith(_TOOL_CALL_END):
            source.text = rest[len(_TOOL_CALL_END) :]
            return
        if source.is_ended or not _TOOL_CALL_END.startswith(rest):
            return
        yield


def _as_json(text: str, types: set[str]) -> str:
    """Return a value's text as JSON: as it stands where it is that and may be, else as a string."""
    if types and "string" in types and not (text == "null" and "null" in types):
        return _encode(text)
    plain = _LITERALS.get(text.strip(), text)
    if len(plain) <= MAX_HELD:
        try:
            json.loads(plain)
        except (ValueError, RecursionError):
            return _encode(text)
        return plain
    return _encode(text)


def _types_of(schema: Any) -> set[str]:
    """Return the JSON types that a value may have; none where the schema does not say."""
    if not isinstance(schema, dict):
        return set()
    found = schema.get("type")
    if isinstance(found, str):
        return {found}
    if isinstance(found, list):
        return {kind for kind in found if isinstance(kind, str)}
    if isinstance(values := schema.get("enum"), list) and values and all(isinstance(value, str) for value in values):
        return {"string"}
    return set()


def _properties(schema: Any) -> dict[str, Any]:
    found = schema.get("properties") if isinstance(schema, dict) else None
    return found if isinstance(found, dict) else {}


def _encode(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
