"""Uses openai-python, sync and async, with its stream and parse helpers, tools and responses."""

import asyncio
import sys

import openai
from pydantic import BaseModel

URL = sys.argv[1] + "/v1"
MODEL = "smollm2"
HI = [{"role": "user", "content": "Say hello."}]
client = openai.OpenAI(base_url=URL, api_key="none", max_retries=0, timeout=240)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Capital(BaseModel):
    country: str
    city: str


def whole() -> None:
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=HI, max_tokens=8)
    assert raw.headers["x-request-id"]
    answer = raw.parse()
    assert answer._request_id == raw.headers["x-request-id"]
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0
    assert answer.system_fingerprint
    history = [*HI, answer.choices[0].message, {"role": "user", "content": "Again.", "name": "Bob"}]
    hints = {"metadata": {"run": "1"}, "service_tier": "auto", "safety_identifier": "a", "prompt_cache_key": "b"}
    again = client.chat.completions.create(
        model=MODEL, messages=history, max_completion_tokens=8, n=2, seed=1, logprobs=True, top_logprobs=2, **hints
    )
    assert len(again.choices) == 2
    assert len(again.choices[0].logprobs.content[0].top_logprobs) == 2
    assert client.completions.create(model=MODEL, prompt=["One", "Two"], max_tokens=4).choices[1].text


def streams() -> None:
    ask = [{"role": "user", "content": "What is the capital of France?"}]
    with client.chat.completions.stream(
        model=MODEL, messages=ask, temperature=0, max_tokens=64, stream_options={"include_usage": True}
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= set(kinds)
    assert final.usage.completion_tokens >= 1
    assert final.choices[0].message.content


def parsed() -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": "France?"}], response_format=Capital, max_tokens=200
    )
    assert isinstance(answer.choices[0].message.parsed, Capital)
    answer = client.chat.completions.create(
        model=MODEL, messages=HI, response_format={"type": "json_object"}, max_tokens=200, temperature=0
    )
    assert answer.choices[0].message.content.lstrip().startswith("{")


def tools() -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HI, tools=[WEATHER], max_tokens=32)
    assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Paris"}'}}
    history = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny"},
    ]
    assert client.chat.completions.create(model=MODEL, messages=history, tools=[WEATHER], max_tokens=8).choices


def responses() -> None:
    answer = client.responses.create(model=MODEL, input="Say hello.", max_output_tokens=16)
    assert answer.output_text
    ask = "What is the capital of France?"
    with client.responses.stream(model=MODEL, input=ask, temperature=0, max_output_tokens=64) as stream:
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
streams()
parsed()
tools()
responses()
asyncio.run(asynchronous())
