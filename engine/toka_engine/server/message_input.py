"""Reads the messages and tools of Anthropic's Messages API as those of a chat."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from toka_engine.server.errors import invalid, mistyped

Message = dict[str, Any]


def read_messages(messages: Sequence[Any], system: Any) -> list[Message]:
    """Return the messages of a chat. Raises a 400 that names the block."""
    found: list[Message] = []
    if system is not None and (text := _text(system, "system")):
        found.append({"role": "system", "content": text})
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role == "user":
            found += _read_user(message.get("content"), f"{path}.content")
        elif role == "assistant":
            found.append(_read_assistant(message.get("content"), f"{path}.content"))
        else:
            raise invalid(f"{path}.role", f"'{path}.role' must be user or assistant.", "invalid_value")
    return found


def _read_user(content: Any, path: str) -> list[Message]:
    """Return results of calls as messages of their own, before the text of the same message."""
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    results: list[Message] = []
    texts: list[str] = []
    for block, where in _blocks(content, path):
        if block["type"] == "tool_result":
            text = _text(block.get("content", ""), f"{where}.content")
            call_id = _string(block, "tool_use_id", where)
            results.append({"role": "tool", "tool_call_id": call_id, "content": text})
        else:
            texts.append(_text_of_block(block, where))
    return [*results, {"role": "user", "content": "\n".join(texts)}] if texts or not results else results


def _read_assistant(content: Any, path: str) -> Message:
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    message: Message = {"role": "assistant", "content": ""}
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Any] = []
    for block, where in _blocks(content, path):
        if block["type"] == "tool_use":
            function = {"name": _string(block, "name", where), "arguments": json.dumps(block.get("input") or {})}
            calls.append({"id": _string(block, "id", where), "type": "function", "function": function})
        elif block["type"] == "thinking":
            thoughts.append(_string(block, "thinking", where))
        elif block["type"] != "redacted_thinking":
            texts.append(_text_of_block(block, where))
    message["content"] = "\n".join(texts)
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def read_tools(tools: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """Return the tools of a chat, and the fields that have no effect: the tools that Anthropic's server would run."""
    functions: list[Any] = []
    ignored: list[str] = []
    for index, tool in enumerate(tools):
        path = f"tools[{index}]"
        if not isinstance(tool, dict):
            raise mistyped(path, "an object")
        kind = tool.get("type") or "custom"
        if kind != "custom":
            ignored.append(f"tools.{kind}")
            continue
        function = {key: tool[key] for key in ("name", "description", "strict") if tool.get(key) is not None}
        if tool.get("input_schema") is not None:
            function["parameters"] = tool["input_schema"]
        functions.append({"type": "function", "function": function})
    return functions, ignored


def read_choice(choice: dict[str, Any] | None) -> Any:
    """Return `tool_choice` as a chat has it. Raises a 400."""
    if choice is None:
        return None
    match choice.get("type"):
        case "auto" | "none" as mode:
            return mode
        case "any":
            return "required"
        case "tool":
            return {"type": "function", "function": {"name": choice.get("name")}}
    raise invalid("tool_choice.type", "'tool_choice.type' must be auto, any, tool or none.", "invalid_value")


def _blocks(content: Any, path: str) -> list[tuple[dict[str, Any], str]]:
    if not isinstance(content, list):
        raise mistyped(path, "a text or a list of blocks")
    found = []
    for index, block in enumerate(content):
        where = f"{path}[{index}]"
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise mistyped(where, "an object with a type")
        found.append((block, where))
    return found


def _text(value: Any, path: str) -> str:
    if isinstance(value, str):
        return value
    return "\n".join(_text_of_block(block, where) for block, where in _blocks(value, path))


def _text_of_block(block: dict[str, Any], path: str) -> str:
    if block["type"] != "text":
        message = f"'{path}.type' is not supported: this server reads text alone."
        raise invalid(f"{path}.type", message, "unsupported_parameter")
    return _string(block, "text", path)


def _string(block: dict[str, Any], key: str, path: str) -> str:
    if not isinstance(block.get(key), str):
        raise mistyped(f"{path}.{key}", "a text")
    text: str = block[key]
    return text
