"""Reads the tools of a response as those of a chat: functions and custom tools; hosted ones this server lacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from toka_engine.server.errors import invalid, mistyped

_CUSTOM_PARAMETERS = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}
_FUNCTION_KEYS = ("name", "description", "parameters", "strict")


class ResponseTools(NamedTuple):
    """The tools as a chat has them."""

    tools: list[Any]
    choice: Any
    custom: frozenset[str]
    """The names of custom tools, whose one argument is free text."""
    ignored: list[str]
    """The fields that have no effect."""


def read_tools(tools: Sequence[Any], choice: Any) -> ResponseTools:
    """Return the tools. Raises a 400 that names the field; the rest is checked as a chat's."""
    functions: list[Any] = []
    custom: set[str] = set()
    hosted: set[str] = set()
    ignored: list[str] = []
    for index, tool in enumerate(tools):
        path = f"tools[{index}]"
        kind = tool.get("type") if isinstance(tool, dict) else None
        if not isinstance(kind, str):
            raise mistyped(path, "an object with a type")
        if kind == "function":
            function = {key: tool[key] for key in _FUNCTION_KEYS if tool.get(key) is not None}
            functions.append({"type": "function", "function": function})
        elif kind == "custom":
            function = {key: tool[key] for key in ("name", "description") if tool.get(key) is not None}
            functions.append({"type": "function", "function": {**function, "parameters": _CUSTOM_PARAMETERS}})
            if isinstance(tool.get("name"), str):
                custom.add(tool["name"])
            form = tool.get("format")
            if isinstance(form, dict) and form.get("type", "text") != "text":
                ignored.append("tools.format")
        else:
            hosted.add(kind)
            ignored.append(f"tools.{kind}")
    return ResponseTools(functions, _read_choice(choice, hosted), frozenset(custom), ignored)


def _read_choice(choice: Any, hosted: set[str]) -> Any:
    if not isinstance(choice, dict):
        return choice
    kind = choice.get("type")
    if kind == "custom":
        return {**choice, "type": "function"}
    if kind in ("function", "allowed_tools"):
        return choice
    if kind in hosted:
        message = f"'tool_choice': this server has no tool of type {kind}; it can call functions alone."
        raise invalid("tool_choice", message, "unsupported_parameter")
    return choice
