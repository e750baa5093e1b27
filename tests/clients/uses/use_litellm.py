"""Uses litellm: completion, streams, text completions, hints, tools, structured output, the vLLM provider."""

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
    assert litellm.completion(f"{provider}/smollm2", history, metadata={"a": "b"}, n=2, **common).choices[1]
tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
assert litellm.completion("openai/smollm2", hi, tools=[tool], **common).choices
assert litellm.text_completion(model="text-completion-openai/smollm2", prompt="One, two,", **common).choices[0].text
schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
assert litellm.completion("openai/smollm2", hi, response_format=form, **{**common, "max_tokens": 64}).choices
