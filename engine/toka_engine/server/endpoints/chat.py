"""`POST /v1/chat/completions`: its bodies, its checks and its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from toka_engine.server.answers import AnswerFormat, FinishedChoice, encode, plain_logprob
from toka_engine.server.chat_template import Turn
from toka_engine.server.decoding import BodyDecoder
from toka_engine.server.errors import invalid
from toka_engine.server.exchange import Exchange
from toka_engine.server.generate import run_job
from toka_engine.server.limits import UNSUPPORTED, GenerationOptions, Limits, int_in, refuse_unsupported
from toka_engine.server.prompts import PromptEncoder
from toka_engine.server.render import ShownToken
from toka_engine.server.request import GenerationRequest, Usage
from toka_engine.server.service import Service

PATH = "/v1/chat/completions"
_UNSUPPORTED: dict[str, tuple[Any, ...]] = UNSUPPORTED | {
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "metadata": ({},),
    "web_search_options": (),
    "chat_template": (),
}
_UNSUPPORTED_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "name": (),
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
    "refusal": (),
    "audio": (),
    "annotations": ([],),
}
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class ContentPart(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    type: str
    text: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    refusal: Any = None


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    role: str
    content: str | list[ContentPart] | None = None
    name: Any = None
    tool_calls: Any = None
    tool_call_id: Any = None
    function_call: Any = None
    refusal: Any = None
    audio: Any = None
    annotations: Any = None


class ChatRequest(GenerationRequest, forbid_unknown_fields=True, frozen=True, kw_only=True):
    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: Any = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    service_tier: Any = None
    store: Any = None
    metadata: Any = None
    web_search_options: Any = None
    chat_template: Any = None


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


class AnswerMessage(msgspec.Struct, frozen=True):
    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None


class ChatFormat(AnswerFormat):
    id_prefix = "chatcmpl"
    chunk_object = "chat.completion.chunk"

    def whole(self, choices: Sequence[FinishedChoice], usage: Usage) -> bytes:
        return encode(
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
            logprobs = encode(self._logprobs(shown)) if self._has_logprobs else b"null"
            events = self._chunk(index, b'{"content":%s}' % encode(text), logprobs, b"null")
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
        return self._name(token), plain_logprob(logprob), list(self._label_of(token))


class ChatCompletions:
    """Answers chat completions."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._decoder = BodyDecoder(ChatRequest)

    async def answer(self, exchange: Exchange) -> None:
        """Answer one request. Raises ApiError and ClientGoneError."""
        service = self._service
        engine = service.serving_engine()
        request = self._decoder.decode(await exchange.read_json(service.budget))
        options = _check(request, engine.limits)
        if engine.template is None:
            raise invalid("messages", "This model has no chat template: use /v1/completions.")
        encoder = PromptEncoder(engine.tokenizer, engine.limits, exchange.connection)
        prompts = [await encoder.encode_chat(_check_messages(request.messages, engine.limits), engine.template)]
        spec = engine.limits.plan(options, prompts, "messages")
        job = engine.make_job(prompts, spec, options, ChatFormat, request.model)
        await run_job(job, exchange, service.streams, service.metrics)


def _check(request: ChatRequest, limits: Limits) -> GenerationOptions:
    """Check everything but the messages."""
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs", "'top_logprobs' needs 'logprobs' to be true.")
    num_top = int_in(request.top_logprobs, "top_logprobs", 0, limits.max_top_logprobs(), 0)
    max_tokens, name = request.max_tokens, "max_tokens"
    if request.max_completion_tokens is not None:
        if max_tokens not in (None, request.max_completion_tokens):
            raise invalid("max_tokens", "'max_tokens' and 'max_completion_tokens' differ.")
        max_tokens, name = request.max_completion_tokens, "max_completion_tokens"
    return limits.check_shared(
        request,
        max_tokens=max_tokens,
        max_tokens_field=name,
        num_logprobs=num_top if request.logprobs else -1,
        unsupported=_UNSUPPORTED,
    )


def _check_messages(messages: Sequence[ChatMessage], limits: Limits) -> list[Turn]:
    """Return the messages as text."""
    if not messages:
        raise invalid("messages", "'messages' is empty.")
    if len(messages) >= limits.max_request_tokens:  # each has at least one token
        raise limits.too_long("messages", len(messages))
    return [_check_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _check_message(message: ChatMessage, path: str) -> Turn:
    role = _ROLES.get(message.role)
    if role is None:
        raise invalid(f"{path}.role", f"'{path}.role' must be one of {', '.join(_ROLES)}.", "invalid_value")
    refuse_unsupported(message, _UNSUPPORTED_IN_MESSAGE, f"{path}.")
    content = message.content
    if content is None:
        raise invalid(f"{path}.content", f"'{path}.content' is missing.", "missing_required_parameter")
    if isinstance(content, str):
        return Turn(role, content)
    texts = []
    for index, part in enumerate(content):
        if part.type != "text":
            where = f"{path}.content[{index}].type"
            raise invalid(where, f"'{where}': only 'text' is supported.", "unsupported_parameter")
        if part.text is None:
            where = f"{path}.content[{index}].text"
            raise invalid(where, f"'{where}' is missing.", "missing_required_parameter")
        texts.append(part.text)
    return Turn(role, "\n".join(texts))
