"""A request's grammar: which fields give one, what bounds it keeps, and what is said of a wrong one."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from toka_engine.grammar.source import GrammarSource
from toka_engine.server.endpoints.chat import ChatRequest
from toka_engine.server.endpoints.completions import CompletionRequest
from toka_engine.server.errors import ApiError
from toka_engine.server.grammar_requests import (
    MAX_DEPTH,
    MAX_ENUM_VALUES,
    MAX_PROPERTIES,
    MAX_REGEX_BYTES,
    MAX_REPETITIONS,
    MAX_SOURCE_BYTES,
    read_grammar,
)

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
NAMELESS = {"type": "json_schema", "json_schema": {}}
TEXT = json.dumps(SCHEMA)


def read(**fields: Any) -> GrammarSource | None:
    body = json.dumps({"model": "m", "prompt": "x", **fields}).encode()
    asked = read_grammar(msgspec.json.decode(body, type=CompletionRequest))
    return asked.source if asked else None


def refusal(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as refused:
        read(**fields)
    assert refused.value.status == 400
    return refused.value


def named(schema: Any, **others: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema} | others}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": None, "structured_outputs": None, "guided_json": None, "guided_regex": None}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object", "json_schema": None}}, GrammarSource("json_object", "")),
        ({"response_format": named(SCHEMA, strict=True)}, GrammarSource("json_schema", TEXT)),
        ({"response_format": named(SCHEMA)}, GrammarSource("json_schema", TEXT, is_lenient=True)),
        ({"response_format": named(SCHEMA, strict=False)}, GrammarSource("json_schema", TEXT, is_lenient=True)),
        ({"structured_outputs": {"json": SCHEMA}}, GrammarSource("json_schema", TEXT)),
        ({"structured_outputs": {"json": TEXT, "regex": None}}, GrammarSource("json_schema", TEXT)),
        ({"structured_outputs": {"json_object": True}}, GrammarSource("json_object", "")),
        ({"guided_json": SCHEMA}, GrammarSource("json_schema", TEXT)),
        ({"guided_json": TEXT}, GrammarSource("json_schema", TEXT)),
        ({"guided_regex": "a+"}, GrammarSource("regex", "a+")),
        ({"guided_choice": ["a", "b"]}, GrammarSource("choice", '["a","b"]')),
        ({"guided_grammar": 'start: "a"'}, GrammarSource("lark", 'start: "a"')),
    ],
)
def test_a_request_has_the_grammar_that_its_fields_ask_for(fields: Any, expected: GrammarSource | None) -> None:
    assert read(**fields) == expected
    body = json.dumps({"model": "m", "messages": [], **fields}).encode()
    asked = read_grammar(msgspec.json.decode(body, type=ChatRequest))
    assert (asked.source if asked else None) == expected


def test_two_grammars_exclude_each_other() -> None:
    error = refusal(guided_regex="a", response_format={"type": "json_object"})
    assert "'response_format' and 'guided_regex'" in error.message


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth // 2):
        schema = {"properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "text, json_object, json_schema"),
        ({"response_format": {}}, "response_format.type", "Missing"),
        ({"response_format": "json"}, "response_format", "object"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        ({"response_format": {"type": "json_object", "x": 1}}, "response_format.x", "Unknown"),
        ({"response_format": named({}) | {"type": "json_object"}}, "response_format.json_schema", "json_schema"),
        ({"response_format": named(None)}, "response_format.json_schema.schema", "missing"),
        ({"response_format": named([])}, "response_format.json_schema.schema", "an object"),
        ({"response_format": named(True)}, "response_format.json_schema.schema", "an object"),
        ({"response_format": NAMELESS}, "response_format.json_schema.name", "Missing"),
        ({"response_format": named({}, name="")}, "response_format.json_schema.name", "1 to 64"),
        ({"structured_outputs": {}}, "structured_outputs", "needs one of"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object", "true"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice", "exclude"),
        ({"structured_outputs": {"other": 1}}, "structured_outputs.other", "Unknown"),
        ({"guided_json": "{"}, "guided_json", "Invalid"),
        ({"guided_json": 5}, "guided_json", "an object"),
        ({"guided_regex": ""}, "guided_regex", "empty"),
        ({"guided_regex": "a" * (MAX_REGEX_BYTES + 1)}, "guided_regex", str(MAX_REGEX_BYTES)),
        ({"guided_json": {"pattern": "a" * (MAX_REGEX_BYTES + 1)}}, "guided_json", str(MAX_REGEX_BYTES)),
        ({"guided_choice": []}, "guided_choice", "at least one"),
        ({"guided_choice": ["a", ""]}, "guided_choice", "empty"),
        ({"guided_choice": ["a"] * (MAX_ENUM_VALUES + 1)}, "guided_choice", str(MAX_ENUM_VALUES)),
        ({"guided_grammar": " "}, "guided_grammar", "empty"),
        ({"guided_grammar": "a" * (MAX_SOURCE_BYTES + 1)}, "guided_grammar", str(MAX_SOURCE_BYTES)),
        ({"guided_json": {"description": "a" * MAX_SOURCE_BYTES}}, "guided_json", str(MAX_SOURCE_BYTES)),
        ({"guided_json": {"enum": list(range(MAX_ENUM_VALUES + 1))}}, "guided_json", str(MAX_ENUM_VALUES)),
        ({"guided_json": {"enum": ["a" * (1 << 20)]}}, "guided_json", str(1 << 20)),
        ({"guided_json": {"properties": {str(n): 1 for n in range(2001)}}}, "guided_json", str(MAX_PROPERTIES)),
        ({"guided_json": {"minItems": MAX_REPETITIONS + 1}}, "guided_json", "minItems"),
        ({"guided_json": nested(2 * MAX_DEPTH)}, "guided_json", "levels deep"),
    ],
)  # fmt: skip
def test_a_grammar_out_of_bounds_is_a_400_that_names_its_place(fields: Any, param: str, words: str) -> None:
    try:
        error = refusal(**fields)
    except msgspec.ValidationError:  # the body's decoder says the rest: see test_bad_input
        raise AssertionError("the field was not decoded by itself") from None
    assert error.param == param
    assert words in error.message


def test_bounds_themselves_are_allowed() -> None:
    assert read(guided_json={"enum": [f"value {n}" for n in range(MAX_ENUM_VALUES)]})
    assert read(guided_json={"properties": {str(n): {} for n in range(MAX_PROPERTIES)}})
    assert read(guided_json={"minItems": MAX_REPETITIONS, "maxLength": 1_000_000})
    assert read(guided_json=nested(MAX_DEPTH - 2))


@pytest.mark.parametrize("field", ["response_format", "structured_outputs", "guided_json"])
@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_endless_nesting_is_a_400(field: str, opening: bytes) -> None:
    raw = opening * 10_000 + b"1" + (b"]" if opening == b"[" else b"}") * 10_000
    request = CompletionRequest(model="m", prompt=msgspec.Raw(b'"x"'), **{field: msgspec.Raw(raw)})
    with pytest.raises(ApiError) as refused:
        read_grammar(request)
    assert refused.value.status == 400
