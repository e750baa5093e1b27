"""The way in which the engine's model writes answers that are more than text: its calls and its reasoning.

Owns: what is decided once, at the start, from the settings, the chat template and the tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import msgspec

from toka_engine.config import EngineConfig
from toka_engine.server.calls.grammars import WRITTEN_TAGS, Reasoning
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
    is_reasoning: bool
    """The model may write reasoning between tags."""
    reasoning_field: str
    """The field of its own for reasoning; `none`: it stays in the content."""
    bytes_of: Sequence[bytes]
    """The bytes of each token, tags that are special tokens included."""
    special_tags: Mapping[str, int]
    """The tags that are special tokens, with their ids."""

    @property
    def has_reasoning(self) -> bool:
        """Return whether reasoning is split off."""
        return self.is_reasoning and self.reasoning_field != "none"

    def reasoning_before(self, prompt_tail: str) -> Reasoning | None:
        """Return the reasoning that may come before an answer's grammar. `prompt_tail`: the end of the prompt."""
        tail = prompt_tail.rstrip()
        if not self.is_reasoning or tail.endswith(REASONING_END):
            return None
        return Reasoning(is_open=tail.endswith(REASONING_BEGIN))

    def write_tag(self, tag: str) -> str:
        """Return a tag as grammars have it: the special token that it is, or its text."""
        return f"<[{self.special_tags[tag]}]>" if tag in self.special_tags else json.dumps(tag)

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
    is_reasoning = template is not None and REASONING_END in template.source
    tags = {*tools.reader.marks, *tools.reader.hidden, *((REASONING_BEGIN, REASONING_END) if is_reasoning else ())}
    special_tags = tokenizer.find_special({*tags, *WRITTEN_TAGS})
    return Dialect(tools, is_reasoning, config.reasoning_field, tokenizer.bytes_with(tags), special_tags)
