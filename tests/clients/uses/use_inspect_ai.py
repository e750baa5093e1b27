"""Uses inspect-ai's provider for servers of OpenAI's API: choices, seeds, logprobs, effort, a tool that is called."""

import asyncio
import os
import sys

from inspect_ai.model import ChatMessageUser, GenerateConfig, get_model
from inspect_ai.tool import ToolFunction, ToolInfo, ToolParams
from inspect_ai.util import JSONSchema

os.environ["TOKA_BASE_URL"] = sys.argv[1] + "/v1"
os.environ["TOKA_API_KEY"] = "none"


async def run() -> None:
    model = get_model("openai-api/toka/smollm2")
    config = GenerateConfig(max_tokens=8, num_choices=2, seed=1, logprobs=True, top_logprobs=2, temperature=0.5)
    hi = [ChatMessageUser(content="Say hello.")]
    answer = await model.generate(hi, config=config)
    assert len(answer.choices) == 2
    first = answer.choices[0].logprobs.content[0]
    assert len(first.top_logprobs) == 2
    assert first.logprob <= 0
    again = await model.generate(hi, config=config)
    assert [choice.message.text for choice in again.choices] == [choice.message.text for choice in answer.choices]
    parameters = ToolParams(properties={"city": JSONSchema(type="string", enum=["Paris", "Rome"])}, required=["city"])
    tool = ToolInfo(name="weather", description="Tell the weather.", parameters=parameters)
    config = GenerateConfig(max_tokens=128, reasoning_effort="low", temperature=0)
    ask = [ChatMessageUser(content="What is the weather in Paris?")]
    answer = await model.generate(ask, tools=[tool], tool_choice=ToolFunction("weather"), config=config)
    (call,) = answer.message.tool_calls
    assert call.function == "weather"
    assert call.parse_error is None
    assert call.arguments["city"] in ("Paris", "Rome")


asyncio.run(run())
