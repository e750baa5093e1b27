"""Checks a request's tools and its choice among them, and says what the answer may call.

Owns: the bounds of tools, and the forms of `tool_choice`. A tool is handed to the chat template as it came, with all
its keys. Pure: no I/O, no state.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from toka_engine.server.calls.source import MAX_CALLS, MAX_NAME
from toka_engine.server.conversation import count_characters
from toka_engine.server.errors import invalid, mistyped

MAX_TOOLS = 128
MAX_TOOLS_CHARACTERS = 1024 * 1024
"""The most characters of all tools of a request."""
_NAME = re.compile(rf"[A-Za-z0-9_.-]{{1,{MAX_NAME}}}")
_MODES: tuple[Literal["none", "auto", "required"], ...] = ("none", "auto", "required")


class Choice(NamedTuple):
    """A checked `tool_choice`: whether calls may or must be made, and of which functions (None: of all)."""

    mode: Literal["none", "auto", "required"]
    names: tuple[str, ...] | None = None
    is_named: bool = False
    """The request names the one function to call."""


class ToolUse(NamedTuple):
    """The tools of a request, checked."""

    tools: list[dict[str, Any]]
    """All tools, as the chat template gets them."""
    parameters: Mapping[str, Any]
    """By function that may be called, the JSON Schema of its arguments."""
    strict: frozenset[str]
    """The functions whose arguments have to follow their schema."""
    choice: Choice
    is_parallel: bool

    @property
    def max_calls(self) -> int:
        return MAX_CALLS if self.is_parallel and not self.choice.is_named else 1


def check_tools(tools: Sequence[Any] | None, tool_choice: Any, parallel_tool_calls: bool | None) -> ToolUse | None:
    """Return what the answer may call; None where it may call nothing. Raises a 400 that names the field."""
    functions = _check_functions(tools or [])
    choice = _check_choice(tool_choice, functions)
    if choice.mode == "none" or not functions:
        return None
    names = functions.keys() if choice.names is None else choice.names
    return ToolUse(
        tools=list(tools or []),
        parameters={name: functions[name].get("parameters") or {"type": "object"} for name in names},
        strict=frozenset(name for name in names if functions[name].get("strict")),
        choice=choice,
        is_parallel=parallel_tool_calls is not False,
    )


def _check_functions(tools: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Return the functions by name."""
    if len(tools) > MAX_TOOLS:
        raise invalid("tools", f"'tools' has {len(tools)} entries; at most {MAX_TOOLS} are allowed.")
    functions: dict[str, dict[str, Any]] = {}
    for index, tool in enumerate(tools):
        path = f"tools[{index}]"
        function = _check_function(tool, path)
        if function["name"] in functions:
            raise invalid(f"{path}.function.name", f"'{path}.function.name' is the name of an earlier tool, too.")
        functions[function["name"]] = function
    if tools:
        count_characters(list(tools), "tools", MAX_TOOLS_CHARACTERS)
    return functions


def _check_function(tool: Any, path: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise mistyped(path, "an object")
    kind = tool.get("type", "function")
    if kind != "function":
        message = f"'{path}.type' is not supported: the model can call functions alone."
        raise invalid(f"{path}.type", message, "unsupported_parameter")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise mistyped(f"{path}.function", "an object")
    check_name(function.get("name"), f"{path}.function.name")
    for key, wanted, name in (
        ("parameters", dict, "an object"),
        ("description", str, "a text"),
        ("strict", bool, "true or false"),
    ):
        if not isinstance(function.get(key), wanted | None):
            raise mistyped(f"{path}.function.{key}", name)
    return function


def check_name(name: Any, path: str) -> str:
    """Return the name of a function. Raises a 400."""
    if name is None:
        raise invalid(path, f"Missing required field: '{path}'.", "missing_required_parameter")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        message = f"'{path}' must have 1 to {MAX_NAME} letters, digits and _ - . alone."
        raise invalid(path, message, "invalid_value")
    return name


def _check_choice(tool_choice: Any, functions: Mapping[str, Any]) -> Choice:
    choice = _read_choice(tool_choice)
    if not functions and choice.mode == "required":
        raise invalid("tool_choice", "'tool_choice' asks for a call, but there are no 'tools'.")
    for name in choice.names or ():
        if name not in functions and (choice.is_named or functions):
            raise invalid("tool_choice", "'tool_choice' names a function that is not among the 'tools'.")
    return choice


def _read_choice(tool_choice: Any) -> Choice:
    if tool_choice is None:
        return Choice("auto")
    if isinstance(tool_choice, str):
        for mode in _MODES:
            if tool_choice == mode:
                return Choice(mode)
    if isinstance(tool_choice, dict):
        if tool_choice.get("type") == "function":
            return Choice("required", (_name_of(tool_choice, "tool_choice"),), is_named=True)
        if tool_choice.get("type") == "allowed_tools":
            return _read_allowed(tool_choice)
    message = "'tool_choice' must be none, auto, required, or an object of type function or allowed_tools."
    raise invalid("tool_choice", message, "invalid_value")


def _read_allowed(tool_choice: dict[str, Any]) -> Choice:
    path = "tool_choice.allowed_tools"
    allowed = tool_choice.get("allowed_tools", tool_choice)  # /v1/responses has it one level higher
    tools = allowed.get("tools") if isinstance(allowed, dict) else None
    if not isinstance(allowed, dict) or not isinstance(tools, list) or not tools:
        raise mistyped(path, "an object with a mode and a list of tools")
    names = tuple(_name_of(tool, f"{path}.tools[{index}]") for index, tool in enumerate(tools))
    mode = allowed.get("mode", "auto")
    if mode == "required":
        return Choice("required", names)
    if mode == "auto":
        return Choice("auto", names)
    raise invalid(f"{path}.mode", f"'{path}.mode' must be auto or required.", "invalid_value")


def _name_of(value: Any, path: str) -> str:
    """Return the name in `{"function": {"name": ...}}`, or as /v1/responses writes it, `{"name": ...}`."""
    inner = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(inner, dict):
        raise mistyped(path, "an object that names a function")
    return check_name(inner.get("name"), f"{path}.function.name")
