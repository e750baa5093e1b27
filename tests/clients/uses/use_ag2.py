"""Uses ag2's agents: whole, streamed, a second turn, a tool that the model calls, and a reply of a given form."""

import asyncio
import sys
from typing import Literal

from ag2 import Agent, tool
from ag2.config import OpenAIConfig
from ag2.tools import ToolResult
from pydantic import BaseModel, Field

options = {"model": "smollm2", "base_url": sys.argv[1] + "/v1", "api_key": "none", "temperature": 0}
asked: list[str] = []


class Capital(BaseModel):
    country: str = Field(max_length=16)
    city: str = Field(max_length=16)


@tool
async def weather(city: Literal["Paris", "Rome"]) -> ToolResult:
    """Tell the weather of a city, which is the reply."""
    asked.append(city)
    return ToolResult(f"Sunny in {city}", final=True)


async def run() -> None:
    ask = "What is the capital of France?"
    reply = await Agent("helper", config=OpenAIConfig(**options, max_tokens=8)).ask(ask)
    assert reply.body.strip()
    assert (await reply.ask("And of Italy?")).body.strip()
    streaming = Agent("helper", config=OpenAIConfig(**options, max_tokens=8, streaming=True))
    assert (await streaming.ask(ask)).body == reply.body
    wide = OpenAIConfig(**options, max_tokens=200)
    formed = await Agent("helper", config=wide, response_schema=Capital).ask("The capital of France is Paris.")
    assert isinstance(await formed.content(), Capital)
    forced = OpenAIConfig(**options, max_tokens=128, tool_choice="required", parallel_tool_calls=False)
    told = await Agent("helper", config=forced, tools=[weather]).ask("What is the weather in Paris?")
    assert [f"Sunny in {city}" for city in asked] == [told.body]


asyncio.run(run())
