"""Uses openai-agents in its default, which is /v1/responses, and over chat completions; with a tool and a stream."""

import asyncio
import sys

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    Runner,
    function_tool,
    set_default_openai_client,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

client = AsyncOpenAI(base_url=sys.argv[1] + "/v1", api_key="none", timeout=240)
set_default_openai_client(client)
set_tracing_disabled(True)
settings = ModelSettings(max_tokens=64, temperature=0)


@function_tool
def weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"Sunny in {city}"


async def run() -> None:
    for model in ("smollm2", OpenAIChatCompletionsModel("smollm2", client)):
        agent = Agent(name="Helper", instructions="Be brief.", model=model, model_settings=settings)
        assert (await Runner.run(agent, "What is the capital of France?")).final_output
        streamed = Runner.run_streamed(agent, "What is the capital of France?")
        assert [event async for event in streamed.stream_events()]
        with_tool = agent.clone(tools=[weather])
        assert (await Runner.run(with_tool, "What is the capital of France?", max_turns=8)).final_output is not None


asyncio.run(run())
