"""The way in which the engine's model writes answers that are more than text: its calls and its reasoning.

Owns: what is decided once, at the start, from the settings, the chat template and the tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from toka_engine.config import EngineConfig
from toka_engine.server.calls.registry import ToolFormat, choose_format
from toka_engine.server.chat_template import ChatTemplate
from toka_engine.server.render import Renderer
from toka_engine.server.split_render import SplitRenderers, Splitting
from toka_engine.server.splitting import REASONING_BEGIN, REASONING_END
from toka_engine.server.tokenization import Tokenizer
from toka_engine.server.tools import ToolUse


class Dialect(msgspec.Struct, frozen=True):
    """The format of a model's calls and reasoning."""

    tools: ToolFormat
    has_reasoning: bool
    reasoning_field: str
    bytes_of: Sequence[bytes]
    """The bytes of each token, tags that are special tokens included."""

    def splitting(self, tools: ToolUse | None, prompt_tail: str) -> Splitting | None:
        """Return how choices are split, None where they are text alone. `prompt_tail`: the end of the prompt."""
        if tools is None and not self.has_reasoning:
            return None
        return Splitting(
            calls=self.tools.reader(tools.parameters) if tools else None,
            max_calls=tools.max_calls if tools else 0,
            has_reasoning=self.has_reasoning,
            begins_in_reasoning=self.has_reasoning and prompt_tail.rstrip().endswith(REASONING_BEGIN),
            call_reason="stop" if tools and tools.choice.is_named else "tool_calls",
        )

    def renderers(self, splitting: Splitting, new_inner: Callable[[], Renderer]) -> SplitRenderers:
        return SplitRenderers(splitting, new_inner, self.bytes_of)


def find_dialect(config: EngineConfig, template: ChatTemplate | None, tokenizer: Tokenizer) -> Dialect:
    """Return the dialect of the model. Raises ModelInvalidError where the settings ask for another."""
    tools = choose_format(config.tool_format, template)
    is_split = config.reasoning_field != "none"
    has_reasoning = is_split and template is not None and REASONING_END in template.source
    tags = {*tools.reader.marks, *tools.reader.hidden, *((REASONING_BEGIN, REASONING_END) if has_reasoning else ())}
    return Dialect(tools, has_reasoning, config.reasoning_field, tokenizer.bytes_with(tags))
