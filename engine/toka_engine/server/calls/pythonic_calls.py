"""Calls written as a list of Python calls with keyword arguments, as Llama 3.2 and 4 do: `[f(a='x', b=[1, True])]`.

Literals are translated to JSON token by token while they come; nothing is evaluated.
"""

from __future__ import annotations

import json
import re

from toka_engine.server.calls.formats import CallReader
from toka_engine.server.calls.source import MAX_NAME, Parts, Source, Steps

_HEAD = re.compile(rf"\s*\[\s*(?P<name>[A-Za-z_][\w.-]{{0,{MAX_NAME - 1}}})\s*\(")
_HEAD_BEGIN = re.compile(rf"\s*(\[\s*([A-Za-z_][\w.-]{{0,{MAX_NAME - 1}}}\s*)?)?")
_NEXT = re.compile(rf"\s*,\s*(?P<name>[A-Za-z_][\w.-]{{0,{MAX_NAME - 1}}})\s*\(")
_NEXT_BEGIN = re.compile(rf"\s*(,\s*([A-Za-z_][\w.-]{{0,{MAX_NAME - 1}}}\s*)?)?")
_LIST_END = re.compile(r"\s*\]")
_LIST_END_BEGIN = re.compile(r"\s*")
_KEY = re.compile(r"\s*,?\s*(?P<key>[A-Za-z_]\w*)\s*=")
_KEY_BEGIN = re.compile(r"\s*,?\s*([A-Za-z_]\w*\s*)?")
_CALL_END = re.compile(r"\s*,?\s*\)")
_CALL_END_BEGIN = re.compile(r"\s*,?\s*")
_BLANKS = re.compile(r"\s+")
_WORD = re.compile(r"[^\s\[\](){},:'\"]+")
_PLAIN = re.compile(r"[^\\'\"]+")
_ESCAPE = re.compile(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{3}|[^xuU0-7]|.)", re.DOTALL)
_LONGEST_ESCAPE = 10
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "\n": "", "0": "\0"}
_LITERALS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_OPENING = {"[": "[", "(": "[", "{": "{"}
_CLOSING = {"]": "]", ")": "]", "}": "}"}


class PythonicCalls(CallReader):
    """Reads a list of calls of declared functions, at the beginning of an answer or between Llama's tags."""

    marks = ("<|python_start|>", "<|python_tag|>")
    hidden = frozenset((*marks, "<|python_end|>"))
    is_at_beginning = True

    def read(self, source: Source, parts: Parts, mark: str) -> Steps[bool]:
        head = yield from source.match(_HEAD, _HEAD_BEGIN)
        if head is None or head["name"] not in self._parameters:
            return False
        while head is not None:
            source.take(head.end())
            parts.call(head["name"])
            yield from _read_arguments(source, parts)
            parts.end_call()
            head = yield from source.match(_NEXT, _NEXT_BEGIN)
        if end := (yield from source.match(_LIST_END, _LIST_END_BEGIN)):
            source.take(end.end())
        return True


def _read_arguments(source: Source, parts: Parts) -> Steps[None]:
    """Read up to the call's closing bracket, and write the arguments as one JSON object."""
    before = "{"
    while True:
        if end := (yield from source.match(_CALL_END, _CALL_END_BEGIN)):
            source.take(end.end())
            parts.arguments("{}" if before == "{" else "}")
            return
        key = yield from source.match(_KEY, _KEY_BEGIN)
        if key is None:
            return
        source.take(key.end())
        parts.arguments(f'{before}"{key["key"]}": ')
        before = ", "
        if not (yield from _Literal(source, parts).read()):
            return


class _Literal:
    """Translates one literal to JSON."""

    def __init__(self, source: Source, parts: Parts) -> None:
        self._source = source
        self._parts = parts
        self._depth = 0
        self._has_comma = False

    def read(self) -> Steps[bool]:
        """Read the literal that begins here, up to what ends it on its own level. Return whether it has an end."""
        source = self._source
        while True:
            yield from source.skip_blanks()
            if not source.text:
                return False
            character = source.text[0]
            if not self._depth and character in ",)":
                return True
            if character in _CLOSING:
                self._close(character)
            elif character == ",":
                self._has_comma = True
                source.take(1)
            else:
                self._write_comma()
                if not (yield from self._read_token(character)):
                    return False

    def _close(self, character: str) -> None:
        self._has_comma = False  # JSON allows none before a closing bracket
        self._depth = max(0, self._depth - 1)
        self._source.take(1)
        self._parts.arguments(_CLOSING[character])

    def _write_comma(self) -> None:
        if self._has_comma:
            self._parts.arguments(", ")
            self._has_comma = False

    def _read_token(self, character: str) -> Steps[bool]:
        if character in _OPENING:
            self._depth += 1
            self._source.take(1)
            self._parts.arguments(_OPENING[character])
        elif character == ":":
            self._source.take(1)
            self._parts.arguments(": ")
        elif character in "'\"":
            return (yield from self._read_string(character))
        else:
            return (yield from self._read_word())
        return True

    def _read_word(self) -> Steps[bool]:
        """Read a number or a name: it ends where another character comes."""
        source = self._source
        while (found := _WORD.match(source.text)) and found.end() == len(source.text) and not source.is_ended:
            yield
        word = source.take(found.end()) if found else source.take(1)
        self._parts.arguments(_as_json(word))
        return True

    def _read_string(self, quote: str) -> Steps[bool]:
        source, parts = self._source, self._parts
        source.take(1)
        parts.arguments('"')
        while True:
            text = source.text
            if found := _PLAIN.match(text):
                parts.arguments(_encode(source.take(found.end())))
            elif text[:1] == "\\":
                if len(text) < _LONGEST_ESCAPE and not source.is_ended:
                    yield
                    continue
                escape = _ESCAPE.match(text)
                if escape is None:
                    return False
                source.take(escape.end())
                parts.arguments(_encode(_unescape(escape[0])))
            elif text:
                source.take(1)
                if text[0] == quote:
                    parts.arguments('"')
                    return True
                parts.arguments(_encode(text[0]))
            elif source.is_ended:
                return False
            else:
                yield


def _unescape(escape: str) -> str:
    """Return the character that an escape in a Python string stands for."""
    kind, digits = escape[1:2], escape[2:]
    if kind in "xuU" and digits:
        code = int(digits, 16)
        return chr(code) if code < 0x110000 and not 0xD800 <= code < 0xE000 else "\N{REPLACEMENT CHARACTER}"
    if kind in "01234567" and digits:
        return chr(int(escape[1:], 8))
    return _ESCAPES.get(kind, kind)


def _as_json(word: str) -> str:
    """Return a bare word as JSON: a number or a constant as such, anything else as a string."""
    if word in _LITERALS:
        return _LITERALS[word]
    try:
        value = json.loads(word)
    except ValueError:
        return json.dumps(word, ensure_ascii=False)
    return word if isinstance(value, int | float) and value == value and abs(value) != float("inf") else f'"{word}"'


def _encode(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
