"""Uses openai-python, sync and async, with its stream and parse helpers, tools and responses."""

import asyncio
import json
import sys
import uuid

import openai
from pydantic import BaseModel, Field

URL = sys.argv[1] + "/v1"
MODEL = "smollm2"
HI = [{"role": "user", "content": "Say hello."}]
client = openai.OpenAI(base_url=URL, api_key="none", max_retries=0, timeout=240)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]},
    },
}


class Capital(BaseModel):
    country: str = Field(max_length=16)
    city: str = Field(max_length=16)


def whole() -> None:
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=HI, max_tokens=8)
    assert raw.headers["x-request-id"]
    answer = raw.parse()
    assert answer._request_id == raw.headers["x-request-id"]
    assert answer.system_fingerprint
    history = [*HI, answer.choices[0].message, {"role": "user", "content": "Again.", "name": "Bob"}]
    hints = {"metadata": {"run": "1"}, "service_tier": "auto", "safety_identifier": "a", "prompt_cache_key": "b"}
    again = client.chat.completions.create(
        model=MODEL, messages=history, max_completion_tokens=8, n=2, seed=1, logprobs=True, top_logprobs=2, **hints
    )
    assert len(again.choices) == 2
    assert len(again.choices[0].logprobs.content[0].top_logprobs) == 2
    assert again.choices[0].message.content != again.choices[1].message.content
    assert client.completions.create(model=MODEL, prompt=["One", "Two"], max_tokens=4).choices[1].text


def cached() -> None:
    """A prompt that came before is in the prefix cache, but for its last tokens."""
    text = f"{uuid.uuid4()}: " + ", ".join(str(number) for number in range(200))
    ask = [{"role": "user", "content": text}]
    usages = [client.chat.completions.create(model=MODEL, messages=ask, max_tokens=1).usage for _ in range(2)]
    first, second = (usage.prompt_tokens_details.cached_tokens for usage in usages)
    assert first < second, usages
    assert usages[1].prompt_tokens - 64 <= second < usages[1].prompt_tokens, usages


def seeded() -> None:
    """A seed fixes the text of each choice; another seed gives another."""
    ask = {"model": MODEL, "messages": HI, "max_tokens": 8, "n": 2}
    first, second, other = (client.chat.completions.create(**ask, seed=seed) for seed in (7, 7, 8))
    texts = [[choice.message.content for choice in answer.choices] for answer in (first, second, other)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def streams() -> None:
    ask = [{"role": "user", "content": "What is the capital of France?"}]
    with client.chat.completions.stream(
        model=MODEL, messages=ask, temperature=0, max_tokens=16, stream_options={"include_usage": True}
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= set(kinds)
    assert final.usage.completion_tokens >= 1
    whole = client.chat.completions.create(model=MODEL, messages=ask, temperature=0, max_tokens=16)
    assert final.choices[0].message.content == whole.choices[0].message.content


def parsed() -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": "France?"}], response_format=Capital, max_tokens=200
    )
    assert isinstance(answer.choices[0].message.parsed, Capital)
    answer = client.chat.completions.create(
        model=MODEL, messages=HI, response_format={"type": "json_object"}, max_tokens=64, temperature=0
    )
    choice = answer.choices[0]
    assert choice.message.content.lstrip().startswith("{")
    assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)


def tools() -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HI, tools=[WEATHER], max_tokens=8)
    message = answer.choices[0].message
    assert message.content or message.tool_calls
    ask = [{"role": "user", "content": "What is the weather in Paris?"}]
    forced = client.chat.completions.create(
        model=MODEL,
        messages=ask,
        tools=[WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=128,
        temperature=0,
    )
    assert forced.choices[0].finish_reason == "tool_calls"
    (made,) = forced.choices[0].message.tool_calls
    assert made.function.name == "weather"
    assert json.loads(made.function.arguments)["city"] in ("Paris", "Rome")
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Paris"}'}}
    history = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny"},
    ]
    told = client.chat.completions.create(model=MODEL, messages=history, tools=[WEATHER], max_tokens=8)
    untold = client.chat.completions.create(model=MODEL, messages=HI, tools=[WEATHER], max_tokens=8)
    assert told.usage.prompt_tokens > untold.usage.prompt_tokens  # the template writes the call and its result


def responses() -> None:
    answer = client.responses.create(model=MODEL, input="Say hello.", max_output_tokens=16)
    assert answer.output_text
    ask = "What is the capital of France?"
    with client.responses.stream(model=MODEL, input=ask, temperature=0, max_output_tokens=16) as stream:
        kinds = {event.type for event in stream}
        assert stream.get_final_response().output_text
    assert {"response.created", "response.output_text.delta"} <= kinds


async def asynchronous() -> None:
    async with openai.AsyncOpenAI(base_url=URL, api_key="none", max_retries=0, timeout=240) as many:
        answers = await asyncio.gather(
            *(many.chat.completions.create(model=MODEL, messages=HI, max_tokens=4) for _ in range(16))
        )
        assert all(answer.choices[0].message.content for answer in answers)
        stream = await many.chat.completions.create(model=MODEL, messages=HI, max_tokens=8, stream=True)
        assert [chunk async for chunk in stream][-1].choices[0].finish_reason
        stream = await many.chat.completions.create(model=MODEL, messages=HI, stream=True)
        async for _ in stream:
            break
        await stream.close()  # the engine goes on


assert [model.id for model in client.models.list()] == [MODEL]
whole()
cached()
seeded()
streams()
parsed()
tools()
responses()
asyncio.run(asynchronous())
