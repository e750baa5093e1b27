"""Uses smolagents' model for servers of OpenAI's API: whole, streamed, with stop sequences and a tool."""

import json
import sys

from smolagents import OpenAIModel, Tool
from smolagents.models import ChatMessage, MessageRole


class Weather(Tool):
    name = "weather"
    description = "Tells the weather of a city."
    inputs = {"city": {"type": "string", "description": "A city.", "enum": ["Paris", "Rome"]}}  # noqa: RUF012  (smolagents' own form)
    output_type = "string"

    def forward(self, city: str) -> str:
        return f"Sunny in {city}"


model = OpenAIModel("smollm2", api_base=sys.argv[1] + "/v1", api_key="none", max_tokens=32)
hi = [ChatMessage(role=MessageRole.USER, content=[{"type": "text", "text": "Say hello."}])]
assert model.generate(hi, stop_sequences=["Observation:"]).content
assert "".join(piece.content or "" for piece in model.generate_stream(hi)).strip()
assert model.generate(hi, tools_to_call_from=[Weather()], tool_choice="auto").token_usage.output_tokens >= 1
wide = OpenAIModel("smollm2", api_base=sys.argv[1] + "/v1", api_key="none", max_tokens=128, temperature=0)
ask = [ChatMessage(role=MessageRole.USER, content="What is the weather in Paris?")]
(call,) = wide.generate(
    ask, tools_to_call_from=[Weather()], parallel_tool_calls=False
).tool_calls  # a call is required by default
assert call.function.name == "weather"
assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
