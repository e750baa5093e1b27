"""Answers of models that call functions, in each format, with what a reader should find in them.

Most are composed of a text before the calls and the calls, as models of the format write them, so that what is expected
is known without reading. The others are written by hand: what models get wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from toka_engine.server.calls.formats import CallReader
from toka_engine.server.calls.json_calls import HermesCalls, LlamaCalls
from toka_engine.server.calls.pythonic_calls import PythonicCalls
from toka_engine.server.calls.xml_calls import XmlCalls

PARAMETERS: dict[str, Any] = {
    "get_weather": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "units": {"enum": ["c", "f"]}},
    },
    "write_file": {"type": "object", "properties": {"path": {"type": "string"}, "text": {"type": "string"}}},
    "plot": {
        "type": "object",
        "properties": {"points": {"type": "array"}, "style": {"type": "object"}, "is_log": {"type": "boolean"}},
    },
    "now": {"type": "object", "properties": {}},
}

Call = tuple[str, dict[str, Any]]


class Transcript(NamedTuple):
    """A model's text, and what is in it. Arguments are compared as values."""

    text: str
    content: str
    calls: list[Call]


WEATHER: Call = ("get_weather", {"city": "Paris", "days": 3})
CALLS: list[list[Call]] = [
    [WEATHER],
    [("now", {})],
    [("get_weather", {"city": "S\u00e3o Paulo \U0001f327 \u6771\u4eac", "units": "c"})],
    [("write_file", {"path": "a/b.py", "text": 'def f(x):\n\treturn {"a": [x]}  # "quoted" \\ \'s\n'})],
    [("write_file", {"path": "", "text": "}]{[ )( <a> & %s ,;: = ] )"})],
    [("plot", {"points": [[1, 2.5], [-3, 4e3], []], "style": {"a": {"b": None, "c": True}}, "is_log": False})],
    [WEATHER, ("get_weather", {"city": "Rome", "days": 1})],
    [WEATHER, ("now", {}), ("plot", {"points": [], "style": {}, "is_log": True})],
]
PREFACES = [
    "",
    "I will look that up.",
    "First line.\n\nSecond line with a < b and c > d.",
    "\u00dcn\u00efc\u00f6de \U0001f600 first:",
    'A JSON example: {"name": 1} and [1, 2].',
    "It ends like a tag <tool",
    "`<tool_cal>` is no tag, </tool_call> neither",
    "x" * 300,
]


def _hermes(calls: list[Call]) -> str:
    return "\n".join(
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"
        for name, arguments in calls
    )


def _xml(calls: list[Call]) -> str:
    def value(argument: Any) -> str:
        return argument if isinstance(argument, str) else json.dumps(argument)

    return "\n".join(
        f"<tool_call>\n<function={name}>\n"
        + "".join(f"<parameter={key}>\n{value(part)}\n</parameter>\n" for key, part in arguments.items())
        + "</function>\n</tool_call>"
        for name, arguments in calls
    )


def _llama(calls: list[Call]) -> str:
    objects = [json.dumps({"name": name, "parameters": arguments}) for name, arguments in calls]
    return "<|python_tag|>" + "; ".join(objects)


def _pythonic(calls: list[Call]) -> str:
    written = [
        f"{name}({', '.join(f'{key}={part!r}' for key, part in arguments.items())})" for name, arguments in calls
    ]
    return f"<|python_start|>[{', '.join(written)}]<|python_end|>"


class Format(NamedTuple):
    reader: type[CallReader]
    write: Callable[[list[Call]], str]
    odd: list[Transcript]
    """Answers that a model gets wrong, or writes otherwise."""


def _no_call(text: str) -> Transcript:
    return Transcript(text, text, [])


_HERMES_ODD = [
    Transcript(
        '<tool_call>{"arguments": {"city": "Paris", "days": 3}, "name": "get_weather"}</tool_call>', "", [WEATHER]
    ),
    Transcript('<tool_call>{"name": "now"}</tool_call>', "", [("now", {})]),
    Transcript('<tool_call>{"name": "now", "arguments": null}</tool_call>', "", [("now", {})]),
    Transcript('<tool_call>{"name": "now", "arguments": {}, "id": 7}</tool_call> done', " done", [("now", {})]),
    Transcript(
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\", \\"days\\": 3}"}', "", [WEATHER]
    ),
    Transcript(
        '<tool_call>{"type": "function", "function": {"name": "now", "arguments": {}}}</tool_call>', "", [("now", {})]
    ),
    Transcript(
        '<tool_call>{"name": "now", "arguments": {}}\n{"name": "now", "arguments": {}}</tool_call>\n',
        "",
        [("now", {})] * 2,
    ),
    Transcript('Hi\n<tool_call>{"name": "now", "arguments": {}}', "Hi", [("now", {})]),
    _no_call("<tool_call>"),
    _no_call("Say <tool_call> twice: <tool_call>"),
    _no_call("<tool_call>\nplain words\n</tool_call>"),
    _no_call('<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
    _no_call('<tool_call>{"name": "now", "arguments": [1]}</tool_call>'),
    _no_call('<tool_call>{"name": "no'),
    _no_call('<tool_call>{"name": "' + "n" * 65 + '", "arguments": {}}</tool_call>'),
    Transcript(
        '<tool_call> or <tool_call>{"name": "now", "arguments": {}}</tool_call>', "<tool_call> or", [("now", {})]
    ),
    _no_call(" leading and trailing \n"),
]
_XML_ODD = [
    Transcript("<function=now>\n</function>\n</tool_call>", "", [("now", {})]),
    Transcript("<tool_call><function=now></function></tool_call>Bye", "Bye", [("now", {})]),
    Transcript(
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n<parameter=days>\n3\n</function>", "", [WEATHER]
    ),
    Transcript(
        "<function=plot>\n<parameter=is_log>\nTrue\n</parameter>\n</function>", "", [("plot", {"is_log": True})]
    ),
    Transcript(
        "<function=plot>\n<parameter=style>\nbold {\n</parameter>\n</function>", "", [("plot", {"style": "bold {"})]
    ),
    Transcript("<function=odd>\n<parameter=a>\n12\n</parameter>\n</function>", "", [("odd", {"a": 12})]),
    _no_call("<tool_call>\nwords"),
    _no_call("<function"),
    _no_call("f<function=a b>"),
    _no_call("<tool_call>\n{}</tool_call>"),
]
_LLAMA_ODD = [
    Transcript('{"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}', "", [WEATHER]),
    Transcript('\n{"type": "function", "name": "now", "parameters": {}}', "", [("now", {})]),
    Transcript('{"parameters": {}, "name": "now"}', "", [("now", {})]),
    Transcript("<|python_tag|>print(1)", "print(1)", []),
    Transcript('Well <|python_tag|>{"name": "now", "parameters": {}}', "Well", [("now", {})]),
    _no_call('{"name": "nobody", "parameters": {}}'),
    _no_call('{"name": "Alice", "age": 3, "more": {"a": 1}}'),
    _no_call('{"answer": [1, {"name": "now"}]}'),
    _no_call("{ not JSON"),
    _no_call('{"name": "now"'),
    _no_call('So: {"name": "now", "parameters": {}}'),
]
_PYTHONIC_ODD = [
    Transcript("[now()]", "", [("now", {})]),
    Transcript(" [ now ( ) , get_weather(city = 'Paris', days=3,) ]", "", [("now", {}), WEATHER]),
    Transcript('[get_weather(city="Paris", days=3)] is it', " is it", [WEATHER]),
    Transcript(
        "[plot(points=[(1, 2), [3,],], style={'a': None,}, is_log=true)]",
        "",
        [("plot", {"points": [[1, 2], [3]], "style": {"a": None}, "is_log": True})],
    ),
    Transcript(
        "[write_file(path='\\x41\\u00e9\\t\\'', text=\"it's\")]",
        "",
        [("write_file", {"path": "A\u00e9\t'", "text": "it's"})],
    ),
    _no_call("[1, 2]"),
    _no_call("[nobody(a=1)]"),
    _no_call("[now"),
    _no_call("See [now()]"),
]

FORMATS: dict[str, Format] = {
    "hermes": Format(HermesCalls, _hermes, _HERMES_ODD),
    "qwen_xml": Format(XmlCalls, _xml, _XML_ODD),
    "llama_json": Format(LlamaCalls, _llama, _LLAMA_ODD),
    "pythonic": Format(PythonicCalls, _pythonic, _PYTHONIC_ODD),
}


def transcripts(name: str) -> list[Transcript]:
    """Return all transcripts of a format, more than 60."""
    form = FORMATS[name]
    composed = [
        Transcript(f"{preface}\n{form.write(calls)}" if preface else form.write(calls), preface, calls)
        for preface in PREFACES
        for calls in CALLS
    ]
    return composed + form.odd
