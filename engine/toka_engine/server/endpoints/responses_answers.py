"""Writes the answers of `POST /v1/responses`, whole and as events."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from toka_engine.server.answers import FinishedChoice, encode
from toka_engine.server.endpoints.chat_answers import ChatFormat
from toka_engine.server.errors import ApiError
from toka_engine.server.render import ShownToken
from toka_engine.server.request import Usage
from toka_engine.server.responses.items import ResponseItems
from toka_engine.server.split_render import SplitRenderer


class ResponseUsage(msgspec.Struct, frozen=True):
    """The tokens of a response."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class Response(msgspec.Struct, kw_only=True):
    """A response: what was asked for, and the items of the answer."""

    id: str
    object: str = "response"
    created_at: int
    status: str = "in_progress"
    background: bool = False
    completed_at: int | None = None
    error: dict[str, str] | None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, Any]
    model: str
    output: list[dict[str, Any]] = []
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, str | None]
    service_tier: str
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[Any]
    top_logprobs: int
    top_p: float
    truncation: str
    usage: ResponseUsage | None = None
    user: str | None


class ResponsesFormat(ChatFormat):
    """Writes one response. Its parts come from the one choice's renderer; whoever keeps responses gets it before the
    client does.
    """

    done = b""

    def __init__(
        self,
        model: str,
        label_of: Any,
        *,
        renderers: list[SplitRenderer],
        response: Response,
        custom_tools: frozenset[str],
        keep: Any,
        **options: Any,
    ) -> None:
        """`keep` is called with the response once it is whole."""
        super().__init__(model, label_of, **options)
        self._renderers = renderers
        self._response = response
        self._items = ResponseItems(custom_tools)
        self._keep = keep
        self._pending: list[ShownToken] = []

    def whole(self, choices: Any, usage: Usage) -> bytes:
        (choice,) = choices
        self._take(choice)
        self._finish(choice.finish_reason)
        return self._seal(usage)

    def opening(self, index: int) -> bytes:
        self._items.announce("response.created", response=self._response)
        self._items.announce("response.in_progress", response=self._response)
        return self._items.take_events()

    def piece(self, index: int, text: str, shown: list[ShownToken], finish_reason: str | None) -> bytes:
        self._take(FinishedChoice(text, finish_reason, shown))
        if finish_reason:
            self._finish(finish_reason)
        return self._items.take_events()

    def usage(self, usage: Usage) -> bytes:
        self._seal(usage)
        self._items.announce(f"response.{self._response.status}", response=self._response)
        return self._items.take_events()

    def error_event(self, error: ApiError) -> bytes:
        """Return the last event of a stream that fails."""
        self._response.status = "failed"
        self._response.error = {"code": "server_error", "message": error.message}
        self._response.output = self._items.all
        self._items.announce("response.failed", response=self._response)
        return self._items.take_events()

    def _take(self, choice: FinishedChoice) -> None:
        parts = self._renderers[0].take_parts()
        self._pending += choice.shown
        logprobs: list[Any] = []
        if self._pending and any(part.kind == "content" for part in parts):
            logprobs = [self._token(token) for token in self._pending]
            self._pending = []
        self._items.add(parts, logprobs)

    def _finish(self, reason: str | None) -> None:
        self._response.status = "incomplete" if reason == "length" else "completed"
        if reason == "length":
            self._response.incomplete_details = {"reason": "max_output_tokens"}
        self._items.finish(self._response.status)

    def _seal(self, usage: Usage) -> bytes:
        response = self._response
        response.output = self._items.all
        response.usage = _usage(usage)
        response.completed_at = int(time.time()) if response.status == "completed" else None
        body = encode(response)
        self._keep(response, body)
        return body


def _usage(usage: Usage) -> ResponseUsage:
    reasoning = usage.completion_tokens_details
    cached = usage.prompt_tokens_details.cached_tokens
    return ResponseUsage(
        usage.prompt_tokens,
        {"cached_tokens": cached, "cache_write_tokens": 0},
        usage.completion_tokens,
        {"reasoning_tokens": 0 if isinstance(reasoning, msgspec.UnsetType) else reasoning.reasoning_tokens},
        usage.total_tokens,
    )
