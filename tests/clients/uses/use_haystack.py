"""Uses haystack's chat generator: whole, streamed, with names and a tool."""

import os
import sys

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"

from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import Tool
from haystack.utils import Secret

options = {"model": "smollm2", "api_base_url": sys.argv[1] + "/v1", "api_key": Secret.from_token("none")}
limits = {"generation_kwargs": {"max_tokens": 16}}
assert (
    OpenAIChatGenerator(**options, **limits).run([ChatMessage.from_user("Say hello.", name="Bob")])["replies"][0].text
)
pieces: list = []
streaming = OpenAIChatGenerator(**options, **limits, streaming_callback=pieces.append)
assert streaming.run([ChatMessage.from_user("Say hello.")])["replies"]
assert pieces
schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
weather = Tool("weather", "Tell the weather of a city.", schema, lambda city: f"Sunny in {city}")
assert OpenAIChatGenerator(**options, **limits, tools=[weather]).run([ChatMessage.from_user("Say hello.")])["replies"]
