"""Uses llama-index's OpenAILike: completions and chat, whole and streamed, and a tool."""

import sys
from typing import Literal

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

options = {"model": "smollm2", "api_base": sys.argv[1] + "/v1", "api_key": "none", "max_tokens": 16, "max_retries": 0}
options |= {"temperature": 0}
hi = [ChatMessage(role="user", content="Say hello.")]
completions = OpenAILike(**options)
text = completions.complete("One, two,").text
assert "three" in text.lower()
assert "".join(piece.delta for piece in completions.stream_complete("One, two,")) == text
chat = OpenAILike(**options, is_chat_model=True, is_function_calling_model=True)
text = chat.chat(hi).message.content
assert text.strip()
assert "".join(piece.delta for piece in chat.stream_chat(hi)) == text


def weather(city: Literal["Paris", "Rome"]) -> str:
    """Tell the weather of a city."""
    return f"Sunny in {city}"


wide = OpenAILike(**{**options, "max_tokens": 128}, is_chat_model=True, is_function_calling_model=True)
tool = FunctionTool.from_defaults(weather)
answer = wide.chat_with_tools([tool], "What is the weather in Paris?", tool_required=True)
(call,) = wide.get_tool_calls_from_response(answer)
assert call.tool_name == "weather"
assert weather(**call.tool_kwargs).startswith("Sunny in")
