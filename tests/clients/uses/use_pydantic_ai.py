"""Uses pydantic-ai: text, streams, and structured output by each of its ways, the default being a tool."""

import asyncio
import sys

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Capital(BaseModel):
    country: str = Field(max_length=16)
    city: str = Field(max_length=16)


model = OpenAIChatModel("smollm2", provider=OpenAIProvider(base_url=sys.argv[1] + "/v1", api_key="none"))
settings = {"max_tokens": 200, "temperature": 0}


async def run() -> None:
    assert (await Agent(model).run("Say hello.", model_settings={"max_tokens": 8})).output
    async with Agent(model).run_stream("Say hello.", model_settings={"max_tokens": 8}) as stream:
        assert await stream.get_output()
    for output in (Capital, NativeOutput(Capital)):
        agent = Agent(model, output_type=output, model_settings=settings)
        assert isinstance((await agent.run("The capital of France is Paris.")).output, Capital)


asyncio.run(run())
