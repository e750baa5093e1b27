"""Reads the input of a response, a text or items, as the messages of a chat.

Owns: which items there are, and how they become messages: calls in a row belong to one message of the assistant, with
the text and the reasoning before them. Items come back from clients as this server once sent them, with or without ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from toka_engine.server.errors import invalid, mistyped

Message = dict[str, Any]
MAX_ITEMS = 16 * 1024
_TEXT_PARTS = ("input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text")


def read_items(items: str | list[Any], name: str = "input") -> list[Message]:
    """Return the messages. Raises a 400 that names the item."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    if len(items) > MAX_ITEMS:
        raise invalid(name, f"'{name}' has more than {MAX_ITEMS} items.")
    messages: list[Message] = []
    reasoning: list[str] = []
    for index, item in enumerate(items):
        path = f"{name}[{index}]"
        if not isinstance(item, dict):
            raise mistyped(path, "an object")
        kind = item.get("type") or "message"
        if kind == "reasoning":
            reasoning.append(_read_reasoning(item, path))
            continue
        read = _READERS.get(kind) if isinstance(kind, str) else None
        if read is None:
            known = ", ".join((*_READERS, "reasoning"))
            text = f"'{path}.type' is not supported: it may be {known}."
            raise invalid(f"{path}.type", text, "unsupported_parameter")
        message = read(item, path)
        if message["role"] == "assistant":
            if thought := "\n".join(filter(None, reasoning)):
                message["reasoning_content"] = thought
            reasoning = []
        _append(messages, message)
    return messages


def _append(messages: list[Message], message: Message) -> None:
    """Add a message; calls join the assistant's message before them."""
    if "tool_calls" in message and messages and messages[-1]["role"] == "assistant":
        before = messages[-1]
        before.setdefault("tool_calls", []).extend(message["tool_calls"])
        if "reasoning_content" in message:
            texts = [before.get("reasoning_content"), message["reasoning_content"]]
            before["reasoning_content"] = "\n".join(filter(None, texts))
    else:
        messages.append(message)


def _read_message(item: Mapping[str, Any], path: str) -> Message:
    role = item.get("role")
    if role not in ("user", "assistant", "system", "developer"):
        raise invalid(f"{path}.role", f"'{path}.role' must be user, assistant, system or developer.", "invalid_value")
    return {"role": role, "content": _text(item.get("content"), f"{path}.content")}


def _read_call(item: Mapping[str, Any], path: str) -> Message:
    return _call(item, path, _string(item, "arguments", path))


def _read_custom_call(item: Mapping[str, Any], path: str) -> Message:
    return _call(item, path, json.dumps({"input": _string(item, "input", path)}, ensure_ascii=False))


def _call(item: Mapping[str, Any], path: str, arguments: str) -> Message:
    function = {"name": _string(item, "name", path), "arguments": arguments}
    call = {"id": _string(item, "call_id", path), "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def _read_output(item: Mapping[str, Any], path: str) -> Message:
    content = _text(item.get("output"), f"{path}.output")
    return {"role": "tool", "tool_call_id": _string(item, "call_id", path), "content": content}


def _read_reasoning(item: Mapping[str, Any], path: str) -> str:
    """Return the text of a reasoning item, else its summary; one that is encrypted only has none."""
    for key in ("content", "summary"):
        if item.get(key):
            return _text(item[key], f"{path}.{key}")
    return ""


_READERS: Mapping[str, Callable[[Mapping[str, Any], str], Message]] = {
    "message": _read_message,
    "function_call": _read_call,
    "function_call_output": _read_output,
    "custom_tool_call": _read_custom_call,
    "custom_tool_call_output": _read_output,
}


def _text(value: Any, path: str) -> str:
    """Return a text, or the texts of parts in lines of their own."""
    if isinstance(value, str):
        return value
    if value is None:
        raise invalid(path, f"Missing required field: '{path}'.", "missing_required_parameter")
    if not isinstance(value, list):
        raise mistyped(path, "a text or a list of parts")
    texts = []
    for index, part in enumerate(value):
        where = f"{path}[{index}]"
        if not isinstance(part, dict):
            raise mistyped(where, "an object")
        if part.get("type") not in _TEXT_PARTS:
            message = f"'{where}.type' is not supported: this server reads text alone ({', '.join(_TEXT_PARTS)})."
            raise invalid(f"{where}.type", message, "unsupported_parameter")
        texts.append(_string(part, "refusal" if part["type"] == "refusal" else "text", where))
    return "\n".join(texts)


def _string(item: Mapping[str, Any], key: str, path: str) -> str:
    value = item.get(key)
    if value is None:
        raise invalid(f"{path}.{key}", f"Missing required field: '{path}.{key}'.", "missing_required_parameter")
    if not isinstance(value, str):
        raise mistyped(f"{path}.{key}", "a text")
    return value
