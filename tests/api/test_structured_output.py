"""Structured output through the whole engine: every answer that is not cut is a text of the request's grammar."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import openai
import pytest

from tests.engine_process import EngineProcess

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
ASK = [{"role": "user", "content": "Describe a person as JSON."}]


def schema_format(schema: dict[str, Any], *, strict: bool = True) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": strict}}


def test_every_choice_that_is_not_cut_fits_the_schema(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="m", messages=ASK, response_format=schema_format(PERSON), n=6, temperature=1.0, max_tokens=80
    )
    whole = [choice.message.content for choice in answer.choices if choice.finish_reason == "stop"]
    assert len(whole) >= 3
    for text in whole:
        jsonschema.validate(json.loads(text), PERSON)
    assert len(set(whole)) > 1


def test_seeds_repeat_penalties_and_logprobs_work_and_a_stream_is_the_same_text(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "m",
        "messages": ASK,
        "response_format": schema_format(PERSON),
        "temperature": 0.9,
        "seed": 11,
        "presence_penalty": 0.5,
        "logprobs": True,
        "top_logprobs": 2,
        "max_tokens": 60,
    }
    first, second = (client.chat.completions.create(**options).choices[0] for _ in range(2))
    pieces = [event.choices[0].delta.content or "" for event in client.chat.completions.create(**options, stream=True)]
    assert first.message.content == second.message.content == "".join(pieces)
    assert first.logprobs is not None
    assert first.logprobs.content is not None
    assert "".join(token.token for token in first.logprobs.content) == first.message.content


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": r"\d{3}-[a-f]{2}"}}, r"\d{3}-[a-f]{2}"),
        ({"guided_regex": r"(yes|no), (sir|madam)"}, r"(yes|no), (sir|madam)"),
        ({"structured_outputs": {"choice": ["red", 'a "quoted" é', "blue"]}}, r'red|a "quoted" é|blue'),
        ({"guided_choice": ["left", "right"]}, r"left|right"),
        ({"structured_outputs": {"grammar": 'start: "a" B+ "c"\nB: "b"'}}, r"ab+c"),
        ({"guided_json": json.dumps({"type": "boolean"})}, r"true|false"),
        ({"structured_outputs": {"json": {"type": "integer", "minimum": 3, "maximum": 5}}}, r"[345]"),
        ({"response_format": {"type": "json_object"}, "stop": ["}"]}, r"\{.*"),
    ],
)
def test_completions_take_every_kind_under_each_name(
    client: openai.OpenAI, fields: dict[str, Any], pattern: str
) -> None:
    answer = client.completions.create(model="m", prompt="Answer: ", max_tokens=40, temperature=1.0, extra_body=fields)
    choice = answer.choices[0]
    if choice.finish_reason == "stop":
        assert re.fullmatch(pattern, choice.text, re.DOTALL), choice.text


def test_requests_with_and_without_a_grammar_share_steps_and_prefixes(
    engine: EngineProcess, client: openai.OpenAI
) -> None:
    """The prompts are equal, so that they run in Hydragen groups."""
    prompt = "The quick brown fox jumps over the lazy dog. " * 12
    plain = client.completions.create(model="m", prompt=prompt, max_tokens=12, temperature=0.0).choices[0].text
    answer = client.completions.create(
        model="m",
        prompt=[prompt] * 4,
        max_tokens=12,
        temperature=0.0,
        n=2,
        extra_body={"guided_choice": ["cat", "cow"]},
    )
    assert {choice.text for choice in answer.choices} <= {"cat", "cow"}
    assert client.completions.create(model="m", prompt=prompt, max_tokens=12, temperature=0.0).choices[0].text == plain


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": schema_format({"type": "array", "uniqueItems": True})}, "response_format", "uniqueItems"),
        ({"guided_regex": "(a"}, "guided_regex", "unclosed"),
        ({"structured_outputs": {"grammar": "start: missing"}}, "structured_outputs", "missing"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "guided_regex"),
        ({"guided_json": {"$ref": "#"}}, "guided_json", "no text fits"),
    ],
)
def test_a_grammar_that_cannot_be_used_is_a_400_that_names_its_field(
    client: openai.OpenAI, fields: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="m", prompt="x", max_tokens=4, extra_body=fields)
    body: Any = refused.value.body
    assert body["param"].startswith(param)
    assert words in body["message"]
