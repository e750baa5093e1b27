"""The bodies of answers: whole ones as structs, streamed ones as server-sent events.

Owns: the shapes of OpenAI's two endpoints. One `AnswerFormat` per request; it holds no state of the
generation.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from toka_engine.server.protocol import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatTokenLogprob,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    TopLogprob,
    Usage,
)
from toka_engine.server.render import ShownToken

_NO_LOGPROB = -9999.0
"""What OpenAI's API writes for a token whose logprob is too low to state."""
_encode = msgspec.json.encode


class FinishedChoice(msgspec.Struct):
    """One choice of a whole answer."""

    text: str
    finish_reason: str | None
    shown: list[ShownToken]


class AnswerFormat(Protocol):
    """How one endpoint writes its answers. Events come complete, with `data: ` and the empty line."""

    model: str

    def whole(self, choices: Sequence[FinishedChoice], usage: Usage) -> bytes: ...

    def opening(self, index: int) -> bytes:
        """The event before the first text of a choice; may be empty."""
        ...

    def piece(self, index: int, text: str, shown: list[ShownToken], finish_reason: str | None) -> bytes:
        """The events for new text of a choice, and for its end if it has one."""
        ...

    def usage(self, usage: Usage) -> bytes: ...


class _Format:
    """What both endpoints share: the constant parts of every event, encoded once per request."""

    id_prefix: str
    chunk_object: str

    def __init__(
        self,
        model: str,
        label_of: Callable[[int], bytes],
        *,
        has_logprobs: bool,
        num_top: int,
        includes_usage: bool,
        names_token_ids: bool,
    ) -> None:
        self.id = f"{self.id_prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.model = model
        self._label_of = label_of
        self._has_logprobs = has_logprobs
        self._num_top = num_top
        self._names_token_ids = names_token_ids
        head = _encode(
            {
                "id": self.id,
                "object": self.chunk_object,
                "created": self.created,
                "model": model,
                "choices": [],
            }
        )
        self._head = b"data: " + head[: -len(b"]}")]
        self._tail = b'],"usage":null}\n\n' if includes_usage else b"]}\n\n"

    def usage(self, usage: Usage) -> bytes:
        return self._head + b'],"usage":' + _encode(usage) + b"}\n\n"

    def _name(self, token: int) -> str:
        if self._names_token_ids:
            return f"token_id:{token}"
        return self._label_of(token).decode("utf-8", "replace")


class CompletionFormat(_Format):
    id_prefix = "cmpl"
    chunk_object = "text_completion"

    def whole(self, choices: Sequence[FinishedChoice], usage: Usage) -> bytes:
        return _encode(
            Completion(
                id=self.id,
                created=self.created,
                model=self.model,
                choices=[
                    CompletionChoice(index, choice.text, self._logprobs(choice.shown), choice.finish_reason)
                    for index, choice in enumerate(choices)
                ],
                usage=usage,
            )
        )

    def opening(self, index: int) -> bytes:
        return b""

    def piece(self, index: int, text: str, shown: list[ShownToken], finish_reason: str | None) -> bytes:
        logprobs = _encode(self._logprobs(shown)) if self._has_logprobs else b"null"
        reason = b'"%s"' % finish_reason.encode() if finish_reason else b"null"
        return b'%s{"index":%d,"text":%s,"logprobs":%s,"finish_reason":%s}%s' % (
            self._head,
            index,
            _encode(text),
            logprobs,
            reason,
            self._tail,
        )

    def _logprobs(self, shown: list[ShownToken]) -> CompletionLogprobs | None:
        if not self._has_logprobs:
            return None
        return CompletionLogprobs(
            tokens=[self._name(token.token) for token in shown],
            token_logprobs=[None if math.isnan(token.logprob) else _plain(token.logprob) for token in shown],
            top_logprobs=[self._tops(token) for token in shown] if self._num_top else None,
            text_offset=[token.begin for token in shown],
        )

    def _tops(self, shown: ShownToken) -> dict[str, float]:
        """The likeliest tokens, and the sampled one behind them if it is not among them, as in OpenAI's API."""
        found: dict[str, float] = {}
        for token, logprob in shown.top:
            found.setdefault(self._name(token), _plain(logprob))
        if not math.isnan(shown.logprob):
            found.setdefault(self._name(shown.token), _plain(shown.logprob))
        return found


class ChatFormat(_Format):
    id_prefix = "chatcmpl"
    chunk_object = "chat.completion.chunk"

    def whole(self, choices: Sequence[FinishedChoice], usage: Usage) -> bytes:
        return _encode(
            ChatCompletion(
                id=self.id,
                created=self.created,
                model=self.model,
                choices=[
                    ChatChoice(index, AnswerMessage(choice.text), self._logprobs(choice.shown), choice.finish_reason)
                    for index, choice in enumerate(choices)
                ],
                usage=usage,
            )
        )

    def opening(self, index: int) -> bytes:
        return self._chunk(index, b'{"role":"assistant","content":""}', b"null", b"null")

    def piece(self, index: int, text: str, shown: list[ShownToken], finish_reason: str | None) -> bytes:
        events = b""
        if text or shown:
            logprobs = _encode(self._logprobs(shown)) if self._has_logprobs else b"null"
            events = self._chunk(index, b'{"content":%s}' % _encode(text), logprobs, b"null")
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

    def _logprobs(self, shown: list[ShownToken]) -> ChatLogprobs | None:
        if not self._has_logprobs:
            return None
        return ChatLogprobs([self._token(token) for token in shown])

    def _token(self, shown: ShownToken) -> ChatTokenLogprob:
        tops: list[Any] = [TopLogprob(*self._entry(token, logprob)) for token, logprob in shown.top]
        return ChatTokenLogprob(*self._entry(shown.token, shown.logprob), tops)

    def _entry(self, token: int, logprob: float) -> tuple[str, float, list[int]]:
        return self._name(token), _plain(logprob), list(self._label_of(token))


def _plain(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _NO_LOGPROB
