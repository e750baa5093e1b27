"""Uses langchain-openai: invoke, stream, batch, names, tools, structured output by each of its methods."""

import sys
from typing import Literal

from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field


class Capital(BaseModel):
    """A country's capital."""

    country: str = Field(max_length=16)
    city: str = Field(max_length=16)


@tool
def weather(city: Literal["Paris", "Rome"]) -> str:
    """Tell the weather of a city."""
    return f"Sunny in {city}"


options = {"base_url": sys.argv[1] + "/v1", "api_key": "none", "model": "smollm2", "max_retries": 0, "timeout": 240}
chat = ChatOpenAI(**options, max_tokens=16)
assert chat.invoke("Say hello.").content
assert chat.invoke([HumanMessage("Say hello.", name="Bob")]).usage_metadata["total_tokens"]
assert "".join(chunk.content for chunk in chat.stream("Say hello."))
assert all(answer.content for answer in chat.batch(["One", "Two", "Three"]))
assert OpenAI(**options, max_tokens=8).invoke("One, two,")
assert chat.bind(logprobs=True, top_logprobs=2).invoke("Hi").response_metadata["logprobs"]["content"]

wide = ChatOpenAI(**options, max_tokens=200, temperature=0)
(made,) = wide.bind_tools([weather], tool_choice="weather").invoke("What is the weather in Paris?").tool_calls
assert made["name"] == "weather"
assert weather.invoke(made["args"]).startswith("Sunny in")
call = {"name": "weather", "args": {"city": "Paris"}, "id": "call_1", "type": "tool_call"}
history = [HumanMessage("Weather?"), AIMessage("", tool_calls=[call]), ToolMessage("Sunny", tool_call_id="call_1")]
answer = wide.bind_tools([weather]).invoke(history)
assert answer.content or answer.tool_calls or answer.invalid_tool_calls, answer

for method in ("json_schema", "function_calling"):
    found = wide.with_structured_output(Capital, method=method).invoke("The capital of France is Paris.")
    assert isinstance(found, Capital), (method, found)
