"""Calls that a real model is made to make: on the CPU with SmolLM2, through the openai SDK."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pydantic
import pytest

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 20},
                    "units": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                },
                "required": ["city", "units"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now", "description": "The time", "parameters": {"type": "object"}}},
]
QUESTION: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


def check_weather(name: str, arguments: str) -> None:
    value = json.loads(arguments)
    assert name == "get_weather"
    assert set(value) == {"city", "units"}
    assert value["units"] in ("celsius", "fahrenheit")


def test_a_named_function_is_called_with_arguments_of_its_schema(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="m", messages=QUESTION, tools=TOOLS, tool_choice=NAMED, n=4, temperature=1, seed=1, max_tokens=120
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        (call,) = choice.message.tool_calls or []
        assert call.type == "function"
        check_weather(call.function.name, call.function.arguments)
        assert choice.message.content is None


def test_a_required_call_streams_as_it_is_answered_whole(client: openai.OpenAI) -> None:
    options: Any = {"model": "m", "messages": QUESTION, "tools": TOOLS[:1], "tool_choice": "required", "temperature": 0}
    whole = client.chat.completions.create(**options, parallel_tool_calls=False, max_tokens=120).choices[0]
    with client.chat.completions.stream(**options, parallel_tool_calls=False, max_tokens=120) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert whole.finish_reason == streamed.finish_reason == "tool_calls"
    for message in (whole.message, streamed.message):
        (call,) = message.tool_calls or []
        assert call.type == "function"
        check_weather(call.function.name, call.function.arguments)
    assert whole.message.content is streamed.message.content is None
    assert [call.function.arguments for call in whole.message.tool_calls or [] if call.type == "function"] == [
        call.function.arguments for call in streamed.message.tool_calls or []
    ]


class Weather(pydantic.BaseModel):
    """The weather in a city"""

    city: str = pydantic.Field(max_length=20)
    units: Literal["celsius", "fahrenheit"]


def test_parse_gives_arguments_as_the_callers_own_type(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Weather)
    choice: Any = {"type": "function", "function": {"name": "Weather"}}
    answer = client.chat.completions.parse(
        model="m", messages=QUESTION, tools=[tool], tool_choice=choice, temperature=0, max_tokens=120
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Weather)


def test_an_answer_is_a_call_or_follows_its_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"sunny": {"type": "boolean"}},
        "required": ["sunny"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "w", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(
        model="m", messages=QUESTION, tools=TOOLS[:1], response_format=form, n=8, temperature=1, seed=3, max_tokens=120
    )
    for choice in answer.choices:
        if choice.message.tool_calls:
            (call, *_) = choice.message.tool_calls
            assert call.type == "function"
            check_weather(call.function.name, call.function.arguments)
            assert choice.message.content is None
        elif choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content or "")["sunny"], bool)


def test_a_response_makes_the_call_it_must_make_and_continues(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", **TOOLS[0]["function"]}
    first = client.responses.create(
        model="m", input="What is the weather in Paris?", tools=[tool], tool_choice="required", max_output_tokens=120
    )
    item: Any = first.output[0]
    check_weather(item.name, item.arguments)
    output: Any = [{"type": "function_call_output", "call_id": item.call_id, "output": "sunny"}]
    second = client.responses.create(model="m", previous_response_id=first.id, input=output, max_output_tokens=10)
    assert second.output_text


def test_a_response_follows_its_text_format(client: openai.OpenAI) -> None:
    class Answer(pydantic.BaseModel):
        is_true: bool

    response = client.responses.parse(model="m", input="Is water wet?", text_format=Answer, max_output_tokens=60)
    assert isinstance(response.output_parsed, Answer)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
    ],
)
def test_what_excludes_a_forced_call_is_named(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    body: Any = {"model": "m", "messages": QUESTION, "tools": TOOLS, **fields}
    extra = {"ignore_eos": body.pop("ignore_eos", None)}
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(**body, extra_body=extra)
    assert refusal.value.param == param
