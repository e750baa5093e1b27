"""Writes the answers of `POST /v1/messages`, whole and as events."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from toka_engine.server.answers import AnswerFormat, FinishedChoice, encode
from toka_engine.server.calls.source import Part
from toka_engine.server.errors import ApiError
from toka_engine.server.render import ShownToken
from toka_engine.server.request import Usage
from toka_engine.server.split_render import SplitRenderer

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "overloaded_error"}


class MessageUsage(msgspec.Struct):
    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0


class AnthropicMessage(msgspec.Struct, kw_only=True):
    """An answer in blocks."""

    id: str
    type: str = "message"
    role: str = "assistant"
    model: str
    content: list[dict[str, Any]] = []
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: MessageUsage


class MessageFormat(AnswerFormat):
    """Writes one message. Its parts come from the one choice's renderer."""

    id_prefix = "msg"
    chunk_object = "message"
    done = b""

    def __init__(
        self,
        model: str,
        label_of: Callable[[int], bytes],
        *,
        renderers: Sequence[SplitRenderer],
        num_prompt_tokens: int,
        stop_sequences: tuple[str, ...],
        **options: Any,
    ) -> None:
        super().__init__(model, label_of, **options)
        self._renderers = renderers
        self._stop_sequences = stop_sequences
        usage = MessageUsage(num_prompt_tokens, 0)
        self._message = AnthropicMessage(id=f"msg_{secrets.token_hex(12)}", model=model, usage=usage)
        self._kind = ""
        self._num_blocks = 0
        self._texts: list[str] = []

    def whole(self, choices: Sequence[FinishedChoice], usage: Usage) -> bytes:
        self._take()
        self._close()
        self._finish(choices[0].finish_reason)
        self._message.usage.output_tokens = usage.completion_tokens
        return encode(self._message)

    def opening(self, index: int) -> bytes:
        return _event("message_start", message=self._message)

    def piece(self, index: int, text: str, shown: list[ShownToken], finish_reason: str | None) -> bytes:
        events = self._take()
        if finish_reason:
            events += self._close()
            self._finish(finish_reason)
        return events

    def usage(self, usage: Usage) -> bytes:
        delta = {"stop_reason": self._message.stop_reason, "stop_sequence": self._message.stop_sequence}
        counts = {"output_tokens": usage.completion_tokens}
        return _event("message_delta", delta=delta, usage=counts) + _event("message_stop")

    def error_event(self, error: ApiError) -> bytes:
        kind = _ERROR_TYPES.get(error.status, "api_error")
        return _event("error", error={"type": kind, "message": error.message})

    def _take(self) -> bytes:
        """Put the next parts into blocks; return their events."""
        events = []
        for part in self._renderers[0].take_parts():
            kind = "arguments" if part.kind == "call" else part.kind
            if part.kind == "call" or kind != self._kind:
                events.append(self._close())
                events.append(self._begin(part))
            if part.kind != "call":
                events.append(self._extend(part.text))
        return b"".join(events)

    def _begin(self, part: Part) -> bytes:
        self._texts = []
        match part.kind:
            case "content":
                block: dict[str, Any] = {"type": "text", "text": ""}
            case "reasoning":
                block = {"type": "thinking", "thinking": "", "signature": ""}
            case _:
                block = {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": part.text, "input": {}}
        self._kind = "arguments" if part.kind == "call" else part.kind
        self._message.content.append(block)
        self._num_blocks += 1
        return _event("content_block_start", index=self._num_blocks - 1, content_block=block)

    def _extend(self, text: str) -> bytes:
        self._texts.append(text)
        match self._kind:
            case "content":
                delta = {"type": "text_delta", "text": text}
            case "reasoning":
                delta = {"type": "thinking_delta", "thinking": text}
            case _:
                delta = {"type": "input_json_delta", "partial_json": text}
        return _event("content_block_delta", index=self._num_blocks - 1, delta=delta)

    def _close(self) -> bytes:
        if not self._kind:
            return b""
        block, text = self._message.content[-1], "".join(self._texts)
        match self._kind:
            case "content":
                block["text"] = text
            case "reasoning":
                block["thinking"] = text
            case _:
                block["input"] = _read_object(text)
        self._kind = ""
        return _event("content_block_stop", index=self._num_blocks - 1)

    def _finish(self, reason: str | None) -> None:
        message = self._message
        message.stop_reason = _STOP_REASONS.get(reason or "stop", "end_turn")
        if any(block["type"] == "tool_use" for block in message.content) and reason == "stop":
            message.stop_reason = "tool_use"  # a named tool's
        cut = self._renderers[0].cut_text
        stop = next((text for text in sorted(self._stop_sequences, key=len) if cut.startswith(text)), None)
        if stop is not None:
            message.stop_reason, message.stop_sequence = "stop_sequence", stop


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), encode({"type": kind, **fields}))


def _read_object(text: str) -> Any:
    """Return a call's input; an empty one where its JSON was cut."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
