"""Uses llama-index's OpenAILike: completions and chat, whole and streamed, and a tool."""

import sys

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

options = {"model": "smollm2", "api_base": sys.argv[1] + "/v1", "api_key": "none", "max_tokens": 16, "max_retries": 0}
hi = [ChatMessage(role="user", content="Say hello.")]
completions = OpenAILike(**options)
assert completions.complete("One, two,").text
assert [piece.delta for piece in completions.stream_complete("One, two,")]
chat = OpenAILike(**options, is_chat_model=True, is_function_calling_model=True)
assert chat.chat(hi).message.content
assert [piece.delta for piece in chat.stream_chat(hi)]


def weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"Sunny in {city}"


assert chat.chat_with_tools([FunctionTool.from_defaults(weather)], "Say hello.").message is not None
