"""Checks the messages of a conversation and makes what the chat template renders: a turn, a small dictionary, of each.

Owns: roles, the parts that content may have, and the rule for further keys: the template gets them, and may read them,
as long as they are small. A null is absence, here too. Pure: no I/O, no state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from toka_engine.server.chat_template import Turn
from toka_engine.server.errors import ApiError, invalid, mistyped
from toka_engine.server.fields import Lacking, lacks
from toka_engine.server.limits import Limits

MAX_FURTHER_CHARACTERS = 64 * 1024
"""The most characters of all further keys of one message; each value and each key counts as one more."""
MAX_REQUEST_FURTHER_CHARACTERS = 1024 * 1024
MAX_DEPTH = 64
"""The deepest nesting of values that the template gets."""
_MAX_NAME = 256

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_LACKING: Mapping[str, Lacking] = {
    "function_call": Lacking("this server has no functions in their old form"),
    "audio": Lacking("this server reads text alone"),
}
_TEXT_OF_PART = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""The key of the text in a part of each type."""


class Conversation(NamedTuple):
    """Checked messages."""

    turns: list[Turn]
    ignored: list[str]
    """Keys of content parts, which have no effect."""


def check_messages(messages: Sequence[dict[str, Any]], limits: Limits) -> Conversation:
    """Return the messages as turns. Raises a 400 that names the place."""
    if not messages:
        raise invalid("messages", "'messages' is empty.")
    if len(messages) >= limits.max_request_tokens:  # each has at least one token
        raise limits.too_long("messages", len(messages))
    ignored: list[str] = []
    turns = [_check_message(message, f"messages[{index}]", ignored) for index, message in enumerate(messages)]
    if sum(len(turn) for turn in turns) > 2 * len(turns):
        room = MAX_REQUEST_FURTHER_CHARACTERS
        for turn in turns:
            room -= count_characters([turn[key] for key in turn if key not in ("role", "content")], "messages", room)
    return Conversation(turns, ignored)


def count_characters(value: Any, name: str, most: int) -> int:
    """Return the characters of all texts and keys in `value`, and one for each value. Raises a 400 that names `name`
    where they are more than `most`, or too deeply nested.
    """
    count, level = 0, [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                count += sum(map(len, each)) + len(each)
                inner += each.values()
            elif isinstance(each, list):
                count += len(each)
                inner += each
            else:
                count += 1 + (len(each) if isinstance(each, str) else 0)
            if count > most:
                raise invalid(name, f"'{name}' has more than {most} characters, keys and values counted.")
        if not inner:
            return count
        level = inner
    raise invalid(name, f"'{name}' is nested more than {MAX_DEPTH} levels deep.")


def _check_message(message: dict[str, Any], path: str, ignored: list[str]) -> Turn:
    if len(message) == 2 and "role" in message and isinstance(message.get("content"), str):  # nearly every one
        return {"role": _check_role(message["role"], path), "content": message["content"]}
    given = {key: value for key, value in message.items() if value is not None}
    if "role" not in given:
        raise invalid(f"{path}.role", f"Missing required field: '{path}.role'.", "missing_required_parameter")
    role = _check_role(given.pop("role"), path)
    content = given.pop("content", None)
    _refuse_lacking(given, path)
    calls = given.pop("tool_calls", None)
    if calls is not None and role != "assistant":
        raise invalid(f"{path}.tool_calls", f"'{path}.tool_calls': only the assistant makes calls.", "invalid_value")
    if "tool_call_id" in given:
        _check_text(given["tool_call_id"], f"{path}.tool_call_id", _MAX_NAME)
    if "name" in given:
        _check_text(given["name"], f"{path}.name", _MAX_NAME)
    for key in ("reasoning", "reasoning_content"):
        if key in given:
            given["reasoning_content"] = _check_text(given[key], f"{path}.{key}", MAX_FURTHER_CHARACTERS)
    if content is None and isinstance(given.get("refusal"), str):
        content = given.pop("refusal")
    if given:
        count_characters(given, path, MAX_FURTHER_CHARACTERS)
    if calls:
        given["tool_calls"] = _check_calls(calls, f"{path}.tool_calls")
        content = content or ""
    return {"role": role, "content": _check_content(content, f"{path}.content", ignored), **given}


def _check_role(role: Any, path: str) -> str:
    found = _ROLES.get(role) if isinstance(role, str) else None
    if found is None:
        raise invalid(f"{path}.role", f"'{path}.role' must be one of {', '.join(_ROLES)}.", "invalid_value")
    return found


def _refuse_lacking(given: dict[str, Any], path: str) -> None:
    for name, lacking in _LACKING.items():
        if name in given:
            if given[name] not in lacking.neutral:
                raise lacks(f"{path}.{name}", lacking)
            del given[name]


def _check_calls(calls: Any, path: str) -> list[dict[str, Any]]:
    """Return earlier calls as templates take them: their arguments as objects, where they are that."""
    if not isinstance(calls, list):
        raise mistyped(path, "a list")
    checked = []
    for index, call in enumerate(calls):
        where = f"{path}[{index}]"
        if not isinstance(call, dict):
            raise mistyped(where, "an object")
        if call.get("type", "function") != "function" or not isinstance(call.get("function"), dict):
            raise invalid(f"{where}.type", f"'{where}' must be a call of type function.", "invalid_value")
        name = call["function"].get("name")
        if name is None:
            where = f"{where}.function.name"
            raise invalid(where, f"Missing required field: '{where}'.", "missing_required_parameter")
        _check_text(name, f"{where}.function.name", _MAX_NAME)
        arguments = _read_arguments(call["function"].get("arguments"), f"{where}.function.arguments")
        checked.append({**call, "type": "function", "function": {"name": name, "arguments": arguments}})
    return checked


def _read_arguments(arguments: Any, path: str) -> Any:
    if arguments is None or isinstance(arguments, dict):
        return arguments or {}
    if not isinstance(arguments, str):
        raise mistyped(path, "a text of JSON")
    try:
        value = msgspec.json.decode(arguments)
        count_characters(value, path, MAX_REQUEST_FURTHER_CHARACTERS)
    except (msgspec.DecodeError, UnicodeError, RecursionError, ApiError):
        return arguments or {}
    return value if isinstance(value, dict) else arguments


def _check_text(value: Any, path: str, most: int) -> str:
    if not isinstance(value, str):
        raise mistyped(path, "a text")
    if len(value) > most:
        raise invalid(path, f"'{path}' has more than {most} characters.")
    return value


def _check_content(content: Any, path: str, ignored: list[str]) -> str:
    """Return the content as one text; texts of parts in lines of their own."""
    if isinstance(content, str):
        return content
    if content is None:
        raise invalid(path, f"'{path}' is missing.", "missing_required_parameter")
    if not isinstance(content, list):
        raise mistyped(path, "a text or a list of parts")
    return "\n".join(_check_part(part, f"{path}[{index}]", ignored) for index, part in enumerate(content))


def _check_part(part: Any, path: str, ignored: list[str]) -> str:
    if not isinstance(part, dict):
        raise mistyped(path, "an object")
    kind = part.get("type")
    if kind is None:
        raise invalid(f"{path}.type", f"Missing required field: '{path}.type'.", "missing_required_parameter")
    key = _TEXT_OF_PART.get(kind) if isinstance(kind, str) else None
    if key is None:
        where = f"{path}.type"
        advice = f"this server reads text alone; a part's type may be {', '.join(_TEXT_OF_PART)}"
        raise invalid(where, f"'{where}' is not supported: {advice}.", "unsupported_parameter")
    if part.get(key) is None:
        raise invalid(f"{path}.{key}", f"'{path}.{key}' is missing.", "missing_required_parameter")
    if not isinstance(part[key], str):
        raise mistyped(f"{path}.{key}", "a text")
    ignored += [f"messages.content.{name}" for name in part if name not in ("type", key) and part[name] is not None]
    text: str = part[key]
    return text
