"""Uses inspect-ai's provider for servers of OpenAI's API: choices, seeds, logprobs, effort, a tool."""

import asyncio
import os
import sys

from inspect_ai.model import ChatMessageUser, GenerateConfig, get_model
from inspect_ai.tool import ToolInfo

os.environ["TOKA_BASE_URL"] = sys.argv[1] + "/v1"
os.environ["TOKA_API_KEY"] = "none"


async def run() -> None:
    model = get_model("openai-api/toka/smollm2")
    config = GenerateConfig(max_tokens=8, num_choices=2, seed=1, logprobs=True, top_logprobs=2, temperature=0.5)
    answer = await model.generate([ChatMessageUser(content="Say hello.")], config=config)
    assert len(answer.choices) == 2
    assert answer.choices[0].logprobs
    tool = ToolInfo(name="weather", description="Tell the weather.")
    config = GenerateConfig(max_tokens=16, reasoning_effort="low")
    assert await model.generate([ChatMessageUser(content="Say hello.")], tools=[tool], config=config)


asyncio.run(run())
