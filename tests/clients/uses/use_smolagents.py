"""Uses smolagents' model for servers of OpenAI's API: whole, streamed, with stop sequences and a tool."""

import sys

from smolagents import OpenAIModel, Tool
from smolagents.models import ChatMessage, MessageRole


class Weather(Tool):
    name = "weather"
    description = "Tells the weather of a city."
    inputs = {"city": {"type": "string", "description": "A city."}}  # noqa: RUF012  (smolagents' own form)
    output_type = "string"

    def forward(self, city: str) -> str:
        return f"Sunny in {city}"


model = OpenAIModel("smollm2", api_base=sys.argv[1] + "/v1", api_key="none", max_tokens=32)
hi = [ChatMessage(role=MessageRole.USER, content=[{"type": "text", "text": "Say hello."}])]
assert model.generate(hi, stop_sequences=["Observation:"]).content
assert list(model.generate_stream(hi))
assert model.generate(hi, tools_to_call_from=[Weather()], tool_choice="auto") is not None
