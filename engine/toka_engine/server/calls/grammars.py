"""Writes the grammar of answers that call functions, in llguidance's Lark, for each format.

Owns: how a forced call is written, so that the reader of the same format finds it; and how calls, an answer's own
grammar and reasoning are put together into one grammar. The arguments follow the function's schema: exactly where it is
strict, else without the keywords that the library cannot enforce.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from toka_engine.grammar.source import GrammarSource
from toka_engine.server.calls.registry import FormatName
from toka_engine.server.splitting import REASONING_BEGIN, REASONING_END
from toka_engine.server.tools import ToolUse

_WHITE_SPACE = r"[ \n]"
"""At most one blank or newline between two JSON tokens."""
_ANY_TEXT = r"/(?s:.*)/"
_START = re.compile(r"^start(?=\s*(\[[^\]\n]*\]\s*)?:)", re.MULTILINE)
_CLIENT_START = "client_start"


class Reasoning(NamedTuple):
    """The reasoning before what a grammar describes."""

    is_open: bool
    """The prompt has the opening tag; else the model may write one."""


class _Grammar:
    """Rules that are being written."""

    def __init__(self, tools: ToolUse | None, literal: Callable[[str], str], *, has_answer: bool) -> None:
        self.literal = literal
        self.has_answer = has_answer
        """An answer without a call has to follow a grammar of its own."""
        self._strict = tools.strict if tools else frozenset()
        self._rules: list[str] = []

    def is_strict(self, function: str) -> bool:
        return function in self._strict

    def add(self, body: str, prefix: str, attributes: str = "") -> str:
        """Add a rule, or a terminal where `prefix` is in capitals; return its name."""
        name = f"{prefix}_{len(self._rules)}"
        self._rules.append(f"{name}{attributes}: {body}")
        return name

    def add_schema(self, schema: Any, *, is_strict: bool) -> str:
        guidance = {"whitespace_pattern": _WHITE_SPACE, "lenient": not is_strict}
        inner = {**schema, "x-guidance": guidance} if isinstance(schema, dict) else schema
        return self.add(f"%json {json.dumps(inner)}", "json")

    def add_client_rules(self, text: str) -> None:
        """Add a client's grammar, whose start gets another name. Raises ValueError where it has none, or several."""
        renamed, count = _START.subn(_CLIENT_START, text)
        if count != 1:
            raise ValueError("the grammar needs one rule 'start'")
        self._rules.append(renamed)

    def text(self, start: str) -> str:
        return "\n".join([f"start: {start}", *self._rules, ""])


def write_grammar(
    format_name: FormatName,
    tools: ToolUse | None,
    answer: GrammarSource | None,
    reasoning: Reasoning | None,
    literal: Callable[[str], str],
) -> GrammarSource:
    """Return the grammar of an answer that makes the calls it must make, or may make, and else is as `answer` says;
    reasoning may come before. `literal` writes a tag in Lark: as a text, or as the special token that it is. Raises
    ValueError where `answer` cannot be a part of a grammar.
    """
    grammar = _Grammar(tools, literal, has_answer=answer is not None)
    alternatives = []
    if tools is not None:
        alternatives.append(_add_calls(grammar, _FORMATS[format_name], tools))
    if answer is not None and (tools is None or tools.choice.mode == "auto"):
        alternatives.append(_add_answer(grammar, answer))
    start = grammar.add(" | ".join(alternatives), "answer")
    if reasoning is not None:
        start = _add_reasoning(grammar, reasoning, start)
    return GrammarSource("lark", grammar.text(start))


def _is_special(tag: str) -> bool:
    return tag.startswith("<")


def _add_reasoning(grammar: _Grammar, reasoning: Reasoning, start: str) -> str:
    end = grammar.literal(REASONING_END)
    if _is_special(end):
        thought = grammar.add(f"{grammar.add(_ANY_TEXT, 'TEXT')}? {end}", "thought")
    else:
        thought = grammar.add(_ANY_TEXT, "thought", f"[suffix={end}]")
    thought = grammar.add(f"{thought} {grammar.add('/[ ' + chr(92) + 'n]{1,4}/', 'BLANKS')}?", "reasoning")
    return f"{thought} {start}" if reasoning.is_open else f"({grammar.literal(REASONING_BEGIN)} {thought})? {start}"


def _add_answer(grammar: _Grammar, answer: GrammarSource) -> str:
    match answer.kind:
        case "json_object":
            return grammar.add_schema({"type": "object"}, is_strict=True)
        case "json_schema":
            return grammar.add_schema(json.loads(answer.text), is_strict=not answer.is_lenient)
        case "choice":
            return grammar.add(" | ".join(json.dumps(choice) for choice in json.loads(answer.text)), "choice")
        case "regex":
            return grammar.add("/" + answer.text.replace("/", r"\/") + "/", "REGEX")
        case "lark":
            grammar.add_client_rules(answer.text)
            return _CLIENT_START


# ---------------------------------------------------------------- calls


def _add_calls(grammar: _Grammar, form: _Format, tools: ToolUse) -> str:
    """Add the rules of one call, or of several; return the rule of all of them."""
    bodies = " | ".join(form.write(grammar, name, schema) for name, schema in tools.parameters.items())
    call = grammar.add(bodies, "call")
    tag = grammar.literal(form.tag) if form.tag else ""
    further = "" if tools.max_calls == 1 else f"({json.dumps(form.separator)} {tag} {call})*"
    calls = f"{call} {further}"
    if form.brackets:
        calls = f"{json.dumps(form.brackets[0])} {calls} {json.dumps(form.brackets[1])}"
    if tools.choice.mode == "required" or grammar.has_answer:
        return grammar.add(f"{tag} {calls}", "calls")
    text = grammar.add(_ANY_TEXT, "TEXT")
    if not tag:
        # Without a tag calls stand at the beginning: other text may not begin as they do.
        other = grammar.add(r"/[^\[{ \n](?s:.*)/", "TEXT")
        return grammar.add(f'"" | {other} | {calls}', "free")
    if _is_special(tag):
        return grammar.add(f"{text}? | {text}? {tag} {calls} {text}?", "free")
    before = grammar.add(_ANY_TEXT, "before", f"[suffix={tag}]")
    return grammar.add(f'"" | {text} | {before} {calls} {text}?', "free")


def _write_hermes(grammar: _Grammar, name: str, schema: Any) -> str:
    end = f'"}}\\n" {grammar.literal("</tool_call>")}'
    return f"{_head(name, 'arguments', chr(10))} {_add_arguments(grammar, name, schema)} {end}"


def _write_llama(grammar: _Grammar, name: str, schema: Any) -> str:
    return f'{_head(name, "parameters")} {_add_arguments(grammar, name, schema)} "}}"'


def _head(name: str, key: str, before: str = "") -> str:
    return json.dumps(f'{before}{{"name": {json.dumps(name)}, "{key}": ')


def _add_arguments(grammar: _Grammar, name: str, schema: Any) -> str:
    return grammar.add_schema(schema, is_strict=grammar.is_strict(name))


def _write_xml(grammar: _Grammar, name: str, schema: Any) -> str:
    def add_argument(key: str, part: Any) -> str:
        value = _add_xml_value(grammar, part, is_strict=grammar.is_strict(name))
        return grammar.add(f"{json.dumps(f'<parameter={key}>{chr(10)}')} {value}", "argument")

    head = json.dumps(f"\n<function={name}>\n")
    arguments = _add_named_arguments(grammar, schema, add_argument, separator="")
    return f'{head} {arguments} "</function>\\n" {grammar.literal("</tool_call>")}'


def _add_xml_value(grammar: _Grammar, schema: Any, *, is_strict: bool) -> str:
    """Add the rule of a value with the closing tag behind it: a string as plain text, others as JSON."""
    end = "\n</parameter>\n"
    if isinstance(schema, dict) and isinstance(values := schema.get("enum"), list) and values:
        texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
        return grammar.add(f"({' | '.join(map(json.dumps, texts))}) {json.dumps(end)}", "value")
    if isinstance(schema, dict) and schema.get("type") == "string":
        return grammar.add(_ANY_TEXT, "value", f"[suffix={json.dumps(end)}]")
    return grammar.add(f"{grammar.add_schema(schema, is_strict=is_strict)} {json.dumps(end)}", "value")


def _write_pythonic(grammar: _Grammar, name: str, schema: Any) -> str:
    def add_argument(key: str, part: Any) -> str:
        value = grammar.add_schema(part, is_strict=grammar.is_strict(name))
        return grammar.add(f"{json.dumps(f'{key}=')} {value}", "argument")

    return f'{json.dumps(f"{name}(")} {_add_named_arguments(grammar, schema, add_argument, separator=", ")} ")"'


def _add_named_arguments(
    grammar: _Grammar, schema: Any, add_argument: Callable[[str, Any], str], separator: str
) -> str:
    """Add the rules of a function's arguments by name: the required ones, then any of the others, in their order."""
    found = schema.get("properties") if isinstance(schema, dict) else None
    properties = found if isinstance(found, dict) else {}
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema} if properties else {}
    rules = {
        key: add_argument(key, {**part, **definitions} if isinstance(part, dict) else part)
        for key, part in properties.items()
    }
    named = schema.get("required") if properties else None
    required = [key for key in named if key in properties] if isinstance(named, list) else []
    optional = [key for key in properties if key not in required]
    between = json.dumps(separator) if separator else ""
    rest = [f"({between} {rules[key]})?" for key in optional]
    if required or not separator:
        first = f" {between} ".join(rules[key] for key in required)
        return grammar.add(" ".join([first, *rest]).strip() or '""', "arguments")
    beginnings = [" ".join([rules[key], *rest[place + 1 :]]) for place, key in enumerate(optional)]
    return grammar.add(" | ".join(['""', *beginnings]), "arguments")


class _Format(NamedTuple):
    """The way in which a format writes forced calls."""

    write: Callable[[_Grammar, str, Any], str]
    """Writes a call of a function, by name and schema, from behind the tag."""
    tag: str = ""
    separator: str = ", "
    brackets: str = ""
    """The characters around all calls."""


WRITTEN_TAGS = ("<tool_call>", "</tool_call>")
"""The tags that grammars of calls have."""
_HERMES = _Format(_write_hermes, "<tool_call>", "\n")
_FORMATS: Mapping[FormatName, _Format] = {
    "hermes": _HERMES,
    "generic": _HERMES,
    "qwen_xml": _Format(_write_xml, "<tool_call>", "\n"),
    "llama_json": _Format(_write_llama, separator="; "),
    "pythonic": _Format(_write_pythonic, brackets="[]"),
}
