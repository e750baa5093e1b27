"""Uses AutoGen's agents, which name every message by default."""

import asyncio
import sys

from autogen_agentchat.agents import AssistantAgent
from autogen_ext.models.openai import OpenAIChatCompletionClient

INFO = {"vision": False, "function_calling": True, "json_output": True, "family": "unknown", "structured_output": True}


def weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"Sunny in {city}"


async def run() -> None:
    client = OpenAIChatCompletionClient(
        model="smollm2", base_url=sys.argv[1] + "/v1", api_key="none", model_info=INFO, max_tokens=16
    )
    for tools in ([], [weather]):
        agent = AssistantAgent("helper", model_client=client, tools=tools)
        assert (await agent.run(task="Say hello.")).messages[-1].content is not None
    async for _ in AssistantAgent("helper", model_client=client, model_client_stream=True).run_stream(task="Hi."):
        pass
    await client.close()


asyncio.run(run())
