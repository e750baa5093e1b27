"""Grammars of forced calls: each allows what its format's reader reads, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llguidance import LLTokenizer
from toka_engine.grammar.compiling import compile_grammar, load_vocabulary
from toka_engine.grammar.source import GrammarSource
from toka_engine.server.calls.grammars import Reasoning, write_grammar
from toka_engine.server.splitting import Splitter
from toka_engine.server.tools import ToolUse, check_tools

from tests.unit.server.test_splitting import calls_of, read, text_of
from tests.unit.server.transcripts import FORMATS, Call

_TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "units": {"type": "string", "enum": ["c", "f"]},
                },
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
    {
        "type": "function",
        "function": {
            "name": "plot",
            "parameters": {
                "type": "object",
                "properties": {
                    "line": {"$ref": "#/$defs/points"},
                    "title": {"type": "string", "format": "nonsense"},
                    "is_log": {"type": "boolean"},
                },
                "$defs": {"points": {"type": "array", "items": {"type": "number"}}},
            },
        },
    },
]
_WEATHER: Call = ("get_weather", {"city": "Paris", "days": 3})
_GOOD: list[list[Call]] = [
    [_WEATHER],
    [("get_weather", {"city": 'S\u00e3o "P"', "days": -1, "units": "f"})],
    [("now", {})],
    [("plot", {"line": [1, 2.5], "is_log": False})],
    [_WEATHER, ("now", {}), ("plot", {})],
]
_BAD: list[list[Call]] = [
    [("nobody", {})],
    [("get_weather", {"city": "Paris"})],
    [("get_weather", {"city": "Paris", "days": 3, "units": "k"})],
    [("get_weather", {"city": "Paris", "days": "three"})],
    [("plot", {"line": ["x"]})],
]


@pytest.fixture(scope="session")
def vocabulary(tokenizer_dir: Path) -> LLTokenizer:
    return load_vocabulary(tokenizer_dir, 49152, (2,))


def tools(choice: Any = "required", is_parallel: bool = True, given: Sequence[Any] = _TOOLS) -> ToolUse:
    found = check_tools(given, choice, is_parallel)
    assert found is not None
    return found


def grammar(name: Any, use: ToolUse | None, answer: GrammarSource | None = None, **options: Any) -> GrammarSource:
    reasoning = options.get("reasoning")
    return write_grammar(name, use, answer, reasoning, options.get("literal", json.dumps))


def is_allowed(source: GrammarSource, vocabulary: LLTokenizer, text: str) -> bool:
    matcher = compile_grammar(source, vocabulary)
    ids = vocabulary.tokenize_str(text)
    return matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()


def write(name: str, calls: list[Call]) -> str:
    """Write calls as a forced answer has them: without Llama's tags, values as JSON."""
    if name == "llama_json":
        return "; ".join(
            json.dumps({"name": call, "parameters": arguments}, ensure_ascii=False) for call, arguments in calls
        )
    if name == "pythonic":
        written = [
            f"{call}({', '.join(f'{key}={json.dumps(value, ensure_ascii=False)}' for key, value in arguments.items())})"
            for call, arguments in calls
        ]
        return f"[{', '.join(written)}]"
    return FORMATS[name].write(calls)


@pytest.mark.parametrize("name", FORMATS)
def test_forced_calls_are_allowed_as_the_format_writes_them(name: str, vocabulary: LLTokenizer) -> None:
    source = grammar(name, tools())
    for calls in _GOOD:
        text = write(name, calls)
        assert is_allowed(source, vocabulary, text), text
        reader = FORMATS[name].reader({call: {} for call, _ in calls})
        if name == "qwen_xml":
            reader = FORMATS[name].reader(tools().parameters)
        assert calls_of(read(Splitter(reader), [text])) == calls


@pytest.mark.parametrize("name", FORMATS)
def test_other_answers_are_not_allowed(name: str, vocabulary: LLTokenizer) -> None:
    source = grammar(name, tools())
    for calls in _BAD:
        assert not is_allowed(source, vocabulary, write(name, calls)), calls
    for text in ("", "Hello", "I call " + write(name, [_WEATHER]), write(name, [_WEATHER]) + " and so"):
        assert not is_allowed(source, vocabulary, text), text


@pytest.mark.parametrize("name", FORMATS)
def test_a_named_function_is_called_once(name: str, vocabulary: LLTokenizer) -> None:
    named = {"type": "function", "function": {"name": "now"}}
    for use in (tools(named), tools(is_parallel=False)):
        source = grammar(name, use)
        assert is_allowed(source, vocabulary, write(name, [("now", {})]))
        assert not is_allowed(source, vocabulary, write(name, [("now", {}), ("now", {})]))
    assert not is_allowed(grammar(name, tools(named)), vocabulary, write(name, [("plot", {})]))


@pytest.mark.parametrize("name", FORMATS)
def test_a_random_walk_through_a_grammar_gives_calls_that_the_reader_finds(
    name: str, vocabulary: LLTokenizer, tokenizer: Any
) -> None:
    use = tools()
    source = grammar(name, use)
    ends = set(b'"}])>/\n<')
    is_end = np.array([token == 2 or set(text) <= ends for token, text in enumerate(tokenizer.bytes_of)])
    for seed in range(4):
        chance = np.random.default_rng(seed)
        matcher = compile_grammar(source, vocabulary)
        ids: list[int] = []
        while not matcher.is_stopped() and len(ids) < 200:
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")[:49152]
            wanted = np.flatnonzero(bits & is_end)
            ids.append(int(chance.choice(wanted if wanted.size else np.flatnonzero(bits))))
            if ids[-1] == 2:
                break
            assert matcher.consume_token(ids[-1])
        text = b"".join(tokenizer.bytes_of[token] for token in ids).decode("utf-8", "replace")
        if ids[-1] == 2 or matcher.is_stopped():
            parts = read(Splitter(FORMATS[name].reader(use.parameters)), [text])
            assert calls_of(parts), text
            assert not text_of(parts, "content"), text


@pytest.mark.parametrize("name", FORMATS)
def test_under_auto_text_is_free_and_calls_are_not(name: str, vocabulary: LLTokenizer) -> None:
    source = grammar(name, tools("auto"))
    for text in ("", "Hello", "a < b", "So: \u00e9"):
        assert is_allowed(source, vocabulary, text), text
    call = write(name, [_WEATHER])
    assert is_allowed(source, vocabulary, call if name in ("llama_json", "pythonic") else f"I look.\n{call} Done")
    assert not is_allowed(source, vocabulary, write(name, [("get_weather", {"city": "Paris"})]))


def test_an_answer_follows_its_schema_or_is_a_call(vocabulary: LLTokenizer) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    source = grammar("hermes", tools("auto"), GrammarSource("json_schema", json.dumps(schema)))
    assert is_allowed(source, vocabulary, '{"a": 1}')
    assert is_allowed(source, vocabulary, write("hermes", [_WEATHER]))
    for text in ("Hello", '{"b": 1}', 'x {"a": 1}'):
        assert not is_allowed(source, vocabulary, text)
    forced = grammar("hermes", tools("required"), GrammarSource("json_schema", json.dumps(schema)))
    assert not is_allowed(forced, vocabulary, '{"a": 1}')
    sources = {
        "c": GrammarSource("choice", '["a b", "c"]'),
        "1/2": GrammarSource("regex", "[0-9]/[0-9]"),
        "{}": GrammarSource("json_object", ""),
        "yes": GrammarSource("lark", 'start: "yes" | other\nother: "no"\n'),
    }
    for good, answer in sources.items():
        source = grammar("hermes", tools("auto"), answer)
        assert is_allowed(source, vocabulary, good)
        assert not is_allowed(source, vocabulary, "Hello")


def test_a_grammar_begins_behind_the_reasoning(vocabulary: LLTokenizer) -> None:
    call = write("hermes", [_WEATHER])
    opened = grammar("hermes", tools(), reasoning=Reasoning(is_open=True))
    assert is_allowed(opened, vocabulary, f"Hm, <tool_call> or {{?\n</think>\n\n{call}")
    assert not is_allowed(opened, vocabulary, call)
    possible = grammar("hermes", tools(), reasoning=Reasoning(is_open=False))
    assert is_allowed(possible, vocabulary, call)
    assert is_allowed(possible, vocabulary, f"<think>Hm</think>{call}")


def test_tags_may_be_special_tokens(vocabulary: LLTokenizer) -> None:
    tags = {"<tool_call>": "<[3]>", "</tool_call>": "<[4]>", "<think>": "<[5]>", "</think>": "<[6]>"}
    source = grammar(
        "hermes",
        tools({"type": "function", "function": {"name": "now"}}),
        reasoning=Reasoning(is_open=True),
        literal=lambda text: tags.get(text, json.dumps(text)),
    )
    matcher = compile_grammar(source, vocabulary)
    head = [*vocabulary.tokenize_str("Hm."), 6, 3]
    body = vocabulary.tokenize_str('\n{"name": "now", "arguments": {}}\n')
    assert matcher.consume_tokens([*head, *body, 4])
    assert matcher.is_accepting()
