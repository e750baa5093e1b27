"""Follows the nesting of JSON text that arrives in pieces, without decoding it.

A whole object's members are found by the standard library's decoder, so that values can be handed on as written.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

_OUTSIDE = re.compile(r'["{}\[\]]')
_INSIDE = re.compile(r'"|\\.?', re.DOTALL)
_BLANKS = re.compile(r"[ \t\r\n]*")
_decode = json.JSONDecoder().raw_decode


class JsonScanner:
    """Follows one text. `depth` is the number of open brackets outside strings."""

    __slots__ = ("_is_escaped", "_is_inside", "depth")

    def __init__(self) -> None:
        self.depth = 0
        self._is_inside = False
        self._is_escaped = False

    def scan(self, text: str, begin: int, *, rises_to: int = -1, falls_to: int = -1) -> int:
        """Return the place of the bracket that brings the depth to either level, -1 where `text` ends before. The next
        call goes on behind that bracket, or where `text` ended.
        """
        place = begin
        if self._is_escaped and place < len(text):
            self._is_escaped = False
            place += 1
        while True:
            found = (_INSIDE if self._is_inside else _OUTSIDE).search(text, place)
            if found is None:
                return -1
            place = found.end()
            character = found[0]
            if character == '"':
                self._is_inside = not self._is_inside
            elif character in "{[":
                self.depth += 1
                if self.depth == rises_to:
                    return found.start()
            elif character in "}]":
                self.depth -= 1
                if self.depth == falls_to:
                    return found.start()
            elif character == "\\":
                self._is_escaped = True
                return -1


class Member(NamedTuple):
    """A member of an object: its value, and the value's text."""

    value: Any
    text: str


def read_members(text: str) -> dict[str, Member] | None:
    """Return the members of the object that `text` is; None where it is none."""
    try:
        return _read_members(text)
    except (ValueError, RecursionError):
        return None


def _read_members(text: str) -> dict[str, Member]:
    members: dict[str, Member] = {}
    place = _expect(text, _skip(text, 0), "{")
    while True:
        key, place = _decode(text, place)
        begin = _expect(text, _skip(text, place), ":")
        value, place = _decode(text, begin)
        if not isinstance(key, str):
            raise ValueError("the key is no string")
        members[key] = Member(value, text[begin:place])
        place = _skip(text, place)
        if text[place : place + 1] == "}" and not text[place + 1 :].strip():
            return members
        place = _expect(text, place, ",")


def _skip(text: str, place: int) -> int:
    found = _BLANKS.match(text, place)
    return found.end() if found else place


def _expect(text: str, place: int, character: str) -> int:
    """Return where the next value begins, behind `character`. Raises ValueError where something else stands."""
    if text[place : place + 1] != character:
        raise ValueError(f"{character} is missing")
    return _skip(text, place + 1)
