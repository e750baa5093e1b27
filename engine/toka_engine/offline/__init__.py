"""The engine inside a script, without a port: `LLM(model).generate(prompts, n=8)`, streamed or with asyncio too.

The engine runs as it does behind HTTP, in processes of its own that end with the script. The only way to it is a Unix
socket in a folder that nobody else may enter.
"""

from toka_engine.offline.asynchronous import AsyncLLM
from toka_engine.offline.outputs import Choice, Output, Piece, SamplingOptions, TokenLogprobs
from toka_engine.offline.synchronous import LLM

__all__ = ["LLM", "AsyncLLM", "Choice", "Output", "Piece", "SamplingOptions", "TokenLogprobs"]
