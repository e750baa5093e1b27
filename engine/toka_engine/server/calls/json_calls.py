"""Calls written as JSON objects with a name and arguments: between tags (Hermes, Qwen 2.5 and 3), or bare (Llama 3).

Arguments are handed on as the model wrote them, while they come, where the name stands before them; else the object is
held until its end.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from toka_engine.server.calls.formats import CallReader
from toka_engine.server.calls.json_scan import JsonScanner, Member, read_members
from toka_engine.server.calls.source import MAX_HELD, MAX_NAME, Parts, Source, Steps

_HEAD = re.compile(
    r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"(?P<name>[^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*'
)
_FIRST_KEY = re.compile(r'\s*\{\s*"(?P<key>[^"\\]*)"')
_FIRST_NAME = re.compile(r'\s*\{\s*"name"\s*:\s*"(?P<name>[^"\\]*)"')
_BEFORE_NAME = re.compile(r'\s*\{\s*"name"\s*(:\s*("[^"\\]*)?)?')
_BEFORE_KEY = re.compile(r'\s*(\{\s*("[^"\\]*)?)?')
_KEYS = frozenset(("type", "name", "arguments", "parameters", "function"))


class _Call(NamedTuple):
    name: str
    arguments: str


class JsonCalls(CallReader):
    """Reads JSON objects that are calls."""

    closing = ""
    """The tag behind the calls; "": none."""
    separators = " \t\r\n"
    """The characters that may stand between two calls."""
    is_declared_only = False
    """Only an object that names a declared function is a call: nothing else marks it as one."""

    def read(self, source: Source, parts: Parts, mark: str) -> Steps[bool]:
        has_call = False
        while (yield from self._read_object(source, parts, mark)):
            has_call = True
            if not (yield from self._find_next(source)):
                break
        return has_call

    def _find_next(self, source: Source) -> Steps[bool]:
        """Take the closing tag, if it stands here; return whether another object does."""
        while True:
            rest = source.text.lstrip(self.separators)
            if rest.startswith("{"):
                return True
            if self.closing and rest.startswith(self.closing):
                source.text = rest[len(self.closing) :]
                return False
            if source.is_ended or not self.closing.startswith(rest):
                return False
            yield

    def _read_object(self, source: Source, parts: Parts, mark: str) -> Steps[bool]:
        """Read one call; return False, with nothing taken, where there is none."""
        if not (yield from self._may_begin(source, mark)):
            return False
        begin = len(source.text) - len(source.text.lstrip(self.separators))
        scanner, seen = JsonScanner(), begin
        while True:
            place = scanner.scan(source.text, seen, rises_to=2, falls_to=0)
            seen = len(source.text)
            if place >= 0:
                break
            if source.is_ended or seen > MAX_HELD:
                return False
            yield
        if place > MAX_HELD:
            return False
        head = _HEAD.fullmatch(source.text, begin, place)
        if head and source.text[place] == "{" and self._is_name(head["name"]):
            source.take(place)
            parts.call(head["name"])
            yield from _stream_arguments(source, parts, scanner)
            return True
        return (yield from self._read_whole(source, parts, scanner, begin, place))

    def _may_begin(self, source: Source, mark: str) -> Steps[bool]:
        """Return whether an object begins here that may be a call, as early as that can be seen."""
        while True:
            rest = source.text.lstrip(self.separators)
            if rest and rest[0] != "{":
                return False
            if rest and mark and not self.is_declared_only:
                return True
            if found := _FIRST_KEY.match(rest):
                if found["key"] not in _KEYS:
                    return False
                if found["key"] != "name":
                    return True
                if name := _FIRST_NAME.match(rest):
                    return self._is_name(name["name"])
                if not _BEFORE_NAME.fullmatch(rest):
                    return False
            elif rest and not _BEFORE_KEY.fullmatch(rest):
                return False
            if source.is_ended or len(rest) > MAX_HELD:
                return False
            yield

    def _read_whole(self, source: Source, parts: Parts, scanner: JsonScanner, begin: int, place: int) -> Steps[bool]:
        """Read an object that has to be seen whole: its name stands behind its arguments, or it has none."""
        seen = place + 1
        while scanner.depth:
            place = scanner.scan(source.text, seen, falls_to=0)
            seen = len(source.text)
            if place >= 0:
                break
            if source.is_ended or seen > MAX_HELD:
                return False
            yield
        call = self._decode(source.text[begin : place + 1]) if place <= MAX_HELD else None
        if call is None:
            return False
        source.take(place + 1)
        parts.call(call.name)
        parts.arguments(call.arguments)
        parts.end_call()
        return True

    def _decode(self, text: str) -> _Call | None:
        members = read_members(text)
        if members and isinstance(members.get("function", Member(None, "")).value, dict):
            members = read_members(members["function"].text)
        name = members["name"].value if members and "name" in members else None
        if not members or not isinstance(name, str) or not self._is_name(name):
            return None
        found = members.get("arguments") or members.get("parameters") or Member(None, "")
        arguments = _arguments_text(found.value, found.text)
        return None if arguments is None else _Call(name, arguments)

    def _is_name(self, name: str) -> bool:
        return 1 <= len(name) <= MAX_NAME and (not self.is_declared_only or name in self._parameters)


class HermesCalls(JsonCalls):
    """Reads `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

    marks = ("<tool_call>",)
    closing = "</tool_call>"


class LlamaCalls(JsonCalls):
    """Reads `{"name": ..., "parameters": {...}}` at the beginning of an answer or behind Llama's tag, several with `;`
    between them.
    """

    marks = ("<|python_tag|>",)
    hidden = frozenset(marks)
    is_at_beginning = True
    is_declared_only = True
    separators = " \t\r\n;,"


def _stream_arguments(source: Source, parts: Parts, scanner: JsonScanner) -> Steps[None]:
    """Hand on the object that begins here, then drop the rest of the object around it."""
    seen = 1
    while (place := scanner.scan(source.text, seen, falls_to=1)) < 0:
        parts.arguments(source.take(len(source.text)))
        seen = 0
        if source.is_ended:
            parts.end_call()
            return
        yield
    parts.arguments(source.take(place + 1))
    while (place := scanner.scan(source.text, 0, falls_to=0)) < 0:
        source.take(len(source.text))
        if source.is_ended:
            parts.end_call()
            return
        yield
    source.take(place + 1)
    parts.end_call()


def _arguments_text(value: Any, text: str) -> str | None:
    """Return a call's arguments as JSON of an object: the text itself, or what a string holds; None for others."""
    if isinstance(value, dict):
        return text
    if value is None:
        return "{}"
    if isinstance(value, str):
        try:
            return value if isinstance(json.loads(value), dict) else None
        except (ValueError, RecursionError):
            return None
    return None
