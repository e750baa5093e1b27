"""Finds the format in which a model writes calls: by name, or by its chat template.

A template that does not render tools gets them in a system message of ours, as `generic` says; the model answers in
Hermes' format then, which is what most models have seen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from toka_engine.errors import ModelInvalidError
from toka_engine.server.calls.formats import CallReader
from toka_engine.server.calls.json_calls import HermesCalls, LlamaCalls
from toka_engine.server.calls.pythonic_calls import PythonicCalls
from toka_engine.server.calls.xml_calls import XmlCalls
from toka_engine.server.chat_template import ChatTemplate, Turn
from toka_engine.server.errors import ApiError

FormatName: TypeAlias = Literal["hermes", "qwen_xml", "llama_json", "pythonic", "generic"]
_READERS: Mapping[FormatName, type[CallReader]] = {
    "hermes": HermesCalls,
    "qwen_xml": XmlCalls,
    "llama_json": LlamaCalls,
    "pythonic": PythonicCalls,
    "generic": HermesCalls,
}
READERS_BY_CLASS = {reader.__name__: reader for reader in _READERS.values()}
_PROBE_NAME = "toka_probe"
_PROBE = {
    "type": "function",
    "function": {
        "name": _PROBE_NAME,
        "description": "A probe",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "string", "description": "A"}},
            "required": ["a"],
        },
    },
}
_INTRODUCTION = """You can call functions. Each line between the tags describes one, its parameters as JSON Schema:
<tools>
{tools}
</tools>
To call a function, answer with a JSON object that has its name and its arguments, between tags of its own:
<tool_call>
{{"name": "NAME", "arguments": {{"PARAMETER": "VALUE"}}}}
</tool_call>
The results then come between <tool_response> tags. Where no function helps, answer without one."""


class ToolFormat(NamedTuple):
    """The format of one model."""

    name: FormatName
    reader: type[CallReader]

    def prepare(self, turns: Sequence[Turn], tools: Sequence[dict[str, Any]]) -> tuple[list[Turn], dict[str, Any]]:
        """Return the turns and variables from which the template renders a conversation with tools."""
        if self.name != "generic":
            return list(turns), {"tools": list(tools)} if tools else {}
        return _write_tools(_write_calls(turns), tools), {}


def choose_format(wanted: FormatName | Literal["auto"], template: ChatTemplate | None) -> ToolFormat:
    """Return the format. Raises ModelInvalidError where the template cannot give the model tools in the wanted one."""
    renders = template is not None and _renders_tools(template)
    if wanted == "auto":
        name = _recognize(template) if template is not None and renders else "generic"
    elif wanted == "generic" or renders:
        name = wanted
    else:
        raise ModelInvalidError(
            f"tool_format={wanted}, but the model's chat template renders no tools; use auto or generic"
        )
    return ToolFormat(name, _READERS[name])


def _renders_tools(template: ChatTemplate) -> bool:
    try:
        return _PROBE_NAME in "".join(template.render([{"role": "user", "content": "x"}], {"tools": [_PROBE]}))
    except (ApiError, MemoryError):  # a template's fault is the answer of the requests that meet it, not of the start
        return False


def _recognize(template: ChatTemplate) -> FormatName:
    """Return the format that a template's text describes to the model."""
    if "<function=" in template.source:
        return "qwen_xml"
    if "<tool_call>" in template.source:
        return "hermes"
    if "<|python_start|>" in template.source or "[func_name1(" in template.source:
        return "pythonic"
    if "<|python_tag|>" in template.source or '{"name": function name' in template.source:
        return "llama_json"
    return "generic"


# ---------------------------------------------------------------- generic: a template without tools


def _write_calls(turns: Sequence[Turn]) -> list[Turn]:
    """Return the turns with calls and results as text, results in a row as one turn of the user."""
    written: list[Turn] = []
    was_result = False
    for turn in turns:
        is_result = turn["role"] == "tool"
        if is_result:
            text = f"<tool_response>\n{turn['content']}\n</tool_response>"
            if was_result:
                written[-1]["content"] += "\n" + text
            else:
                written.append({"role": "user", "content": text})
        elif turn.get("tool_calls"):
            calls = [_write_call(call["function"]) for call in turn["tool_calls"]]
            rest = {key: value for key, value in turn.items() if key != "tool_calls"}
            written.append({**rest, "content": "\n".join(filter(None, [turn["content"], *calls]))})
        else:
            written.append(turn)
        was_result = is_result
    return written


def _write_call(function: Mapping[str, Any]) -> str:
    call = {"name": function["name"], "arguments": function["arguments"]}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def _write_tools(turns: list[Turn], tools: Sequence[dict[str, Any]]) -> list[Turn]:
    """Return the turns with the tools described in the system message."""
    if not tools:
        return turns
    described = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    text = _INTRODUCTION.format(tools=described)
    if turns and turns[0]["role"] == "system":
        return [{**turns[0], "content": f"{turns[0]['content']}\n\n{text}"}, *turns[1:]]
    return [{"role": "system", "content": text}, *turns]
