"""Uses haystack's chat generator: whole, streamed, with names and a tool that the model calls."""

import os
import sys

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"

from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import Tool
from haystack.utils import Secret

options = {"model": "smollm2", "api_base_url": sys.argv[1] + "/v1", "api_key": Secret.from_token("none")}
limits = {"generation_kwargs": {"max_tokens": 16, "temperature": 0}}
ask = [ChatMessage.from_user("What is the capital of France?")]
answer = OpenAIChatGenerator(**options, **limits).run(ask)["replies"][0]
assert answer.text.strip()
assert answer.meta["usage"]["completion_tokens"] >= 1
assert OpenAIChatGenerator(**options, **limits).run([ChatMessage.from_user("Hi.", name="Bob")])["replies"][0].text
pieces: list = []
streaming = OpenAIChatGenerator(**options, **limits, streaming_callback=pieces.append)
assert streaming.run(ask)["replies"][0].text == answer.text
assert "".join(piece.content for piece in pieces) == answer.text
schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
weather = Tool("weather", "Tell the weather of a city.", schema, lambda city: f"Sunny in {city}")
forced = {
    "generation_kwargs": {"max_tokens": 128, "temperature": 0, "tool_choice": "required", "parallel_tool_calls": False}
}
question = [ChatMessage.from_user("What is the weather in Paris?")]
(call,) = OpenAIChatGenerator(**options, **forced, tools=[weather]).run(question)["replies"][0].tool_calls
assert call.tool_name == "weather"
assert call.arguments["city"] in ("Paris", "Rome")
