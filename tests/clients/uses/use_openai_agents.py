"""Uses openai-agents in its default, which is /v1/responses, and over chat completions; with a tool and a stream."""

import asyncio
import sys
from typing import Literal

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
forced = ModelSettings(max_tokens=128, temperature=0, tool_choice="weather")


@function_tool
def weather(city: Literal["Paris", "Rome"]) -> str:
    """Tell the weather of a city."""
    return f"Sunny in {city}"


async def run() -> None:
    for model in ("smollm2", OpenAIChatCompletionsModel("smollm2", client)):
        agent = Agent(name="Helper", instructions="Be brief.", model=model, model_settings=settings)
        answer = (await Runner.run(agent, "What is the capital of France?")).final_output
        assert answer.strip()
        streamed = Runner.run_streamed(agent, "What is the capital of France?")
        kinds = {event.type async for event in streamed.stream_events()}
        assert "raw_response_event" in kinds
        assert streamed.final_output == answer
        with_tool = agent.clone(tools=[weather], model_settings=forced, tool_use_behavior="stop_on_first_tool")
        assert (await Runner.run(with_tool, "What is the weather in Paris?")).final_output.startswith("Sunny in")


asyncio.run(run())
