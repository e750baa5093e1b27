"""Writes the answers of `POST /v1/chat/completions`: plain ones, and those with reasoning and calls of functions."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from toka_engine.server.answers import AnswerFormat, FinishedChoice, PromptByToken, encode, plain_logprob
from toka_engine.server.calls.source import Part
from toka_engine.server.render import ShownToken
from toka_engine.server.request import Usage
from toka_engine.server.split_render import SplitRenderer, assemble


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[ChatTokenLogprob]
    refusal: None = None


class CalledFunction(msgspec.Struct, frozen=True):
    """The function of a call; `arguments` is JSON as the model wrote it."""

    name: str
    arguments: str


class ChatToolCall(msgspec.Struct, frozen=True):
    id: str
    function: CalledFunction
    type: str = "function"


class AnswerMessage(msgspec.Struct):
    content: str | None
    role: str = "assistant"
    refusal: None = None
    tool_calls: list[ChatToolCall] | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None
    system_fingerprint: str
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptByToken | UnsetType = UNSET


class ChatFormat(AnswerFormat):
    id_prefix = "chatcmpl"
    chunk_object = "chat.completion.chunk"

    def whole(self, choices: Sequence[FinishedChoice], usage: Usage) -> bytes:
        return encode(
            ChatCompletion(
                id=self.id,
                created=self.created,
                model=self.model,
                choices=[self._choice(index, choice) for index, choice in enumerate(choices)],
                usage=usage,
                system_fingerprint=self.fingerprint,
                prompt_token_ids=self.prompt_ids(0),
                prompt_logprobs=choices[0].prompt_logprobs,
            )
        )

    def _choice(self, index: int, choice: FinishedChoice) -> ChatChoice:
        message, shown = self._message(choice.source, choice.text), choice.shown
        return ChatChoice(index, message, self._logprobs(shown), choice.finish_reason, self._ids(shown))

    def _message(self, index: int, text: str) -> AnswerMessage:
        return AnswerMessage(text)

    def opening(self, index: int) -> bytes:
        return self._opening(index, b'{"role":"assistant","content":""}')

    def _opening(self, index: int, delta: bytes) -> bytes:
        event = self._chunk(index, delta, b"null", b"null")
        if self.returns_ids:
            event = event[: -len(b"}\n\n")] + b',"prompt_token_ids":%s}\n\n' % encode(self.prompt_ids(index))
        return event

    def piece(self, index: int, text: str, shown: list[ShownToken], finish_reason: str | None) -> bytes:
        events = b""
        if text or shown:
            events = self._chunk(index, b'{"content":%s}' % encode(text), *self._token_fields(shown))
        if finish_reason:
            events += self._chunk(index, b"{}", b"null", b'"%s"' % finish_reason.encode())
        return events

    def _chunk(self, index: int, delta: bytes, logprobs: bytes, reason: bytes) -> bytes:
        return b'%s{"index":%d,"delta":%s,"logprobs":%s,"finish_reason":%s}%s' % (
            self._head,
            index,
            delta,
            logprobs,
            reason,
            self._tail,
        )

    def _token_fields(self, shown: list[ShownToken]) -> tuple[bytes, bytes]:
        """Return the logprobs of an event that ends nothing, and what stands behind them: its finish reason and ids."""
        logprobs = encode(self._logprobs(shown)) if self._has_logprobs else b"null"
        return logprobs, b'null,"token_ids":' + encode(self._ids(shown)) if self.returns_ids else b"null"

    def _logprobs(self, shown: list[ShownToken]) -> ChatLogprobs | None:
        if not self._has_logprobs:
            return None
        return ChatLogprobs([self._token(token) for token in shown])

    def _token(self, shown: ShownToken) -> ChatTokenLogprob:
        tops: list[Any] = [TopLogprob(*self._entry(token, logprob)) for token, logprob in shown.top]
        return ChatTokenLogprob(*self._entry(shown.token, shown.logprob), tops)

    def _entry(self, token: int, logprob: float) -> tuple[str, float, list[int]]:
        return self._name(token), plain_logprob(logprob), list(self._label_of(token))


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


class SplitChatFormat(ChatFormat):
    """Writes the parts that the renderers of its choices find. A piece of text may give any number of events."""

    def __init__(
        self,
        model: str,
        label_of: Callable[[int], bytes],
        *,
        renderers: Sequence[SplitRenderer],
        reasoning_field: str,
        **options: Any,
    ) -> None:
        """`renderers`: of the choices, in their order; filled by the time when they are needed."""
        super().__init__(model, label_of, **options)
        self._renderers = renderers
        self._reasoning_field = reasoning_field
        self._pending: dict[int, list[ShownToken]] = {}
        """By choice, the tokens whose logprobs no event has carried yet, because their text is held back."""

    def _message(self, index: int, text: str) -> AnswerMessage:
        found = assemble(self._renderers[index].take_parts())
        calls = [ChatToolCall(new_call_id(), CalledFunction(name, arguments)) for name, arguments in found.calls]
        content = found.content or (None if calls or found.reasoning else "")
        message = AnswerMessage(content)
        if calls:
            message.tool_calls = calls
        if found.reasoning:
            setattr(message, self._reasoning_field, found.reasoning)
        return message

    def opening(self, index: int) -> bytes:
        return self._opening(index, b'{"role":"assistant","content":null}')

    def piece(self, index: int, text: str, shown: list[ShownToken], finish_reason: str | None) -> bytes:
        renderer = self._renderers[index]
        deltas = [self._delta(part) for part in renderer.take_parts()]
        if finish_reason and not renderer.has_parts:
            deltas.append(b'{"content":""}')
        logprobs = reason = b"null"
        if self._has_logprobs or self.returns_ids:
            pending = self._pending.pop(index, []) + shown
            if pending and not deltas and finish_reason:
                deltas.append(b"{}")
            if pending and deltas:
                logprobs, reason = self._token_fields(pending)
            elif pending:
                self._pending[index] = pending
        events = []
        for delta in deltas:
            events.append(self._chunk(index, delta, logprobs, reason))
            logprobs = reason = b"null"
        if finish_reason:
            events.append(self._chunk(index, b"{}", b"null", b'"%s"' % finish_reason.encode()))
        return b"".join(events)

    def _delta(self, part: Part) -> bytes:
        if part.kind == "content":
            return b'{"content":%s}' % encode(part.text)
        if part.kind == "reasoning":
            return b'{"%s":%s}' % (self._reasoning_field.encode(), encode(part.text))
        if part.kind == "call":
            return (
                b'{"tool_calls":[{"index":%d,"id":"%s","type":"function","function":{"name":%s,"arguments":""}}]}'
                % (
                    part.call,
                    new_call_id().encode(),
                    encode(part.text),
                )
            )
        return b'{"tool_calls":[{"index":%d,"function":{"arguments":%s}}]}' % (part.call, encode(part.text))
