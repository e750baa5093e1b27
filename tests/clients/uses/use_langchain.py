"""Uses langchain-openai: invoke, stream, batch, names, tools, structured output by each of its methods."""

import sys

from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel


class Capital(BaseModel):
    """A country's capital."""

    country: str
    city: str


@tool
def weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"Sunny in {city}"


options = {"base_url": sys.argv[1] + "/v1", "api_key": "none", "model": "smollm2", "max_retries": 0, "timeout": 240}
chat = ChatOpenAI(**options, max_tokens=16)
assert chat.invoke("Say hello.").content
assert chat.invoke([HumanMessage("Say hello.", name="Bob")]).usage_metadata["total_tokens"]
assert "".join(chunk.content for chunk in chat.stream("Say hello."))
assert len(chat.batch(["One", "Two", "Three"])) == 3
assert OpenAI(**options, max_tokens=8).invoke("One, two,")
assert chat.bind(logprobs=True, top_logprobs=2).invoke("Hi").response_metadata["logprobs"]["content"]

assert isinstance(chat.bind_tools([weather]).invoke("What is the weather in Paris?"), AIMessage)
call = {"name": "weather", "args": {"city": "Paris"}, "id": "call_1", "type": "tool_call"}
history = [HumanMessage("Weather?"), AIMessage("", tool_calls=[call]), ToolMessage("Sunny", tool_call_id="call_1")]
assert chat.bind_tools([weather]).invoke(history).content is not None

wide = ChatOpenAI(**options, max_tokens=200, temperature=0)
for method in ("json_schema", "function_calling"):
    found = wide.with_structured_output(Capital, method=method).invoke("The capital of France is Paris.")
    assert isinstance(found, Capital), (method, found)
