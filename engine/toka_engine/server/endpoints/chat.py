"""`POST /v1/chat/completions`: its bodies, its checks and its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from toka_engine.server.answers import AnswerFormat, FinishedChoice, encode, plain_logprob
from toka_engine.server.conversation import check_messages
from toka_engine.server.decoding import BodyDecoder
from toka_engine.server.errors import invalid
from toka_engine.server.exchange import Exchange
from toka_engine.server.generate import run_job
from toka_engine.server.limits import GenerationOptions, Limits, int_in
from toka_engine.server.prompts import PromptEncoder
from toka_engine.server.render import ShownToken
from toka_engine.server.request import GenerationRequest, Usage, doc
from toka_engine.server.service import Service
from toka_engine.server.settings import check_shared

PATH = "/v1/chat/completions"


class ChatRequest(GenerationRequest, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The body of a chat request."""

    messages: Annotated[
        list[dict[str, Any]],
        doc("Roles system, developer, user, assistant; content as text or as parts; the template gets further keys."),
    ]
    max_completion_tokens: Annotated[int | None, doc("The same as `max_tokens`.")] = None
    logprobs: Annotated[bool | None, doc("The logprob of each token.")] = None
    top_logprobs: Annotated[
        int | None, doc("0 to `max_topk_logprobs` likeliest tokens beside each one; only together with `logprobs`.")
    ] = None
    verbosity: Annotated[str | None, doc("A hint without effect, named in `x-toka-ignored`.")] = None


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
        request = await service.read(exchange, self._decoder)
        options = _check(request, engine.limits)
        if engine.template is None:
            raise invalid("messages", "This model has no chat template: use /v1/completions.")
        encoder = PromptEncoder(engine.tokenizer, engine.limits, exchange.connection)
        turns, ignored = check_messages(request.messages, engine.limits)
        service.note_ignored(exchange, ignored)
        prompts = [await encoder.encode_chat(turns, engine.template)]
        spec = engine.limits.plan(options, prompts, "messages")
        job = engine.make_job(prompts, spec, options, ChatFormat, request.model)
        await run_job(job, exchange, service.streams, service.metrics)


def _check(request: ChatRequest, limits: Limits) -> GenerationOptions:
    """Check everything but the messages."""
    if request.top_logprobs and not request.logprobs:
        raise invalid("top_logprobs", "'top_logprobs' needs 'logprobs' to be true.")
    num_top = int_in(request.top_logprobs, "top_logprobs", 0, limits.max_top_logprobs(), 0)
    max_tokens, name = request.max_tokens, "max_tokens"
    if request.max_completion_tokens is not None:
        if max_tokens not in (None, request.max_completion_tokens):
            raise invalid("max_tokens", "'max_tokens' and 'max_completion_tokens' differ.")
        max_tokens, name = request.max_completion_tokens, "max_completion_tokens"
    return check_shared(
        request,
        limits,
        max_tokens=max_tokens,
        max_tokens_field=name,
        num_logprobs=num_top if request.logprobs else -1,
    )
