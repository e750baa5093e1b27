"""Uses AutoGen's agents, which name every message by default: whole, streamed, and with a tool that the model calls."""

import asyncio
import json
import sys
from typing import Literal

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.messages import ModelClientStreamingChunkEvent
from autogen_core import FunctionCall
from autogen_core.models import UserMessage
from autogen_core.tools import FunctionTool
from autogen_ext.models.openai import OpenAIChatCompletionClient

INFO = {"vision": False, "function_calling": True, "json_output": True, "family": "unknown", "structured_output": True}


def weather(city: Literal["Paris", "Rome"]) -> str:
    """Tell the weather of a city."""
    return f"Sunny in {city}"


def make_client(max_tokens: int) -> OpenAIChatCompletionClient:
    return OpenAIChatCompletionClient(
        model="smollm2",
        base_url=sys.argv[1] + "/v1",
        api_key="none",
        model_info=INFO,
        max_tokens=max_tokens,
        temperature=0,
    )


async def run() -> None:
    client = make_client(16)
    ask = "What is the capital of France?"
    answer = (await AssistantAgent("helper", model_client=client).run(task=ask)).messages[-1]
    assert answer.content.strip()
    streaming = AssistantAgent("helper", model_client=client, model_client_stream=True)
    pieces = [event async for event in streaming.run_stream(task=ask)]
    text = "".join(piece.content for piece in pieces if isinstance(piece, ModelClientStreamingChunkEvent))
    assert text == answer.content
    with_tool = AssistantAgent("helper", model_client=client, tools=[weather])
    assert (await with_tool.run(task="Say hello.")).messages[-1].content.strip()
    await client.close()

    client = make_client(128)
    tool = FunctionTool(weather, description="Tell the weather of a city.")
    message = UserMessage(content="What is the weather in Paris?", source="Bob")
    called = await client.create([message], tools=[tool], tool_choice=tool)
    (call,) = called.content
    assert isinstance(call, FunctionCall)
    assert call.name == "weather"
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    await client.close()


asyncio.run(run())
