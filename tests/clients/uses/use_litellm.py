"""Uses litellm: completion, streams, text completions, hints, tools, structured output, the vLLM provider."""

import json
import sys

import litellm

url = sys.argv[1] + "/v1"
hi = [{"role": "user", "content": "Say hello."}]
common = {"api_base": url, "api_key": "none", "max_tokens": 8, "timeout": 240, "num_retries": 0}
for provider in ("openai", "hosted_vllm"):
    answer = litellm.completion(f"{provider}/smollm2", hi, **common)
    assert answer.choices[0].message.content
    assert answer.usage.prompt_tokens
    stream = litellm.completion(
        f"{provider}/smollm2", hi, stream=True, stream_options={"include_usage": True}, **common
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    history = [*hi, answer.choices[0].message, {"role": "user", "content": "Again.", "name": "Bob"}]
    again = litellm.completion(f"{provider}/smollm2", history, metadata={"a": "b"}, n=2, **common)
    assert len(again.choices) == 2
city = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
tool = {"type": "function", "function": {"name": "weather", "parameters": city}}
assert litellm.completion("openai/smollm2", hi, tools=[tool], **common).usage.completion_tokens >= 1
wide = {**common, "max_tokens": 128, "temperature": 0}
ask = [{"role": "user", "content": "What is the weather in Paris?"}]
once = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
forced = litellm.completion("openai/smollm2", ask, **once, **wide).choices[0]
assert forced.finish_reason == "tool_calls"
assert forced.message.tool_calls[0].function.name == "weather"
assert json.loads(forced.message.tool_calls[0].function.arguments)["city"] in ("Paris", "Rome")
assert litellm.text_completion(model="text-completion-openai/smollm2", prompt="One, two,", **common).choices[0].text
number = {"type": "integer", "minimum": 0, "maximum": 99}
schema = {"type": "object", "properties": {"a": number}, "required": ["a"], "additionalProperties": False}
form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
found = litellm.completion("openai/smollm2", hi, response_format=form, **wide).choices[0].message.content
assert isinstance(json.loads(found)["a"], int)
