"""`POST /v1/completions`: its bodies, its checks and its answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import UNSET, Meta, UnsetType

from toka_engine.messages import Int32s
from toka_engine.server.answers import AnswerFormat, FinishedChoice, PromptByToken, encode, plain_logprob
from toka_engine.server.decoding import BodyDecoder
from toka_engine.server.exchange import Exchange
from toka_engine.server.generate import run_job
from toka_engine.server.large_requests import Preparer
from toka_engine.server.limits import GenerationOptions, Limits, int_in
from toka_engine.server.preparation import Preparation
from toka_engine.server.render import ShownToken
from toka_engine.server.request import GenerationRequest, Usage, doc
from toka_engine.server.service import Service
from toka_engine.server.settings import check_shared

PATH = "/v1/completions"
DEFAULT_MAX_TOKENS = 16
_TOKEN_IDS = {"type": "array", "items": {"type": "integer"}}
_PROMPT: dict[str, Any] = {
    "description": "A text, token ids, or a list of either.",
    "anyOf": [
        {"type": "string"},
        _TOKEN_IDS,
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": _TOKEN_IDS},
    ],
}


class CompletionRequest(GenerationRequest, forbid_unknown_fields=True, frozen=True, kw_only=True):
    prompt: Annotated[msgspec.Raw, Meta(extra_json_schema=_PROMPT)]
    """Decoded in `reading`."""
    echo: Annotated[bool | None, doc("Each text begins with its prompt's.")] = None
    logprobs: Annotated[
        int | None, doc("0 to `max_topk_logprobs` likeliest tokens beside each one, with their logprobs.")
    ] = None


class CompletionLogprobs(msgspec.Struct, frozen=True):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    prompt_token_ids: list[int] | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptByToken | UnsetType = UNSET


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None
    system_fingerprint: str


class CompletionFormat(AnswerFormat):
    id_prefix = "cmpl"
    chunk_object = "text_completion"

    def whole(self, choices: Sequence[FinishedChoice], usage: Usage) -> bytes:
        return encode(
            Completion(
                id=self.id,
                created=self.created,
                model=self.model,
                choices=[self._choice(index, choice) for index, choice in enumerate(choices)],
                usage=usage,
                system_fingerprint=self.fingerprint,
            )
        )

    def _choice(self, index: int, choice: FinishedChoice) -> CompletionChoice:
        if not (self._has_logprobs or self.returns_ids) and choice.prompt_logprobs is UNSET:
            return CompletionChoice(index, choice.text, None, choice.finish_reason)
        return CompletionChoice(
            index,
            choice.text,
            self._logprobs(choice.shown),
            choice.finish_reason,
            self.prompt_ids(index),
            self._ids(choice.shown),
            choice.prompt_logprobs,
        )

    def opening(self, index: int) -> bytes:
        if not self.returns_ids:
            return b""
        choice = CompletionChoice(index, "", None, None, self.prompt_ids(index), [])
        return self._head + encode(choice) + self._tail

    def piece(self, index: int, text: str, shown: list[ShownToken], finish_reason: str | None) -> bytes:
        logprobs = encode(self._logprobs(shown)) if self._has_logprobs else b"null"
        reason = b'"%s"' % finish_reason.encode() if finish_reason else b"null"
        if self.returns_ids:
            reason += b',"token_ids":' + encode(self._ids(shown))
        return b'%s{"index":%d,"text":%s,"logprobs":%s,"finish_reason":%s}%s' % (
            self._head,
            index,
            encode(text),
            logprobs,
            reason,
            self._tail,
        )

    def _logprobs(self, shown: list[ShownToken]) -> CompletionLogprobs | None:
        if not self._has_logprobs:
            return None
        return CompletionLogprobs(
            tokens=[self._name(token.token) for token in shown],
            token_logprobs=[None if math.isnan(token.logprob) else plain_logprob(token.logprob) for token in shown],
            top_logprobs=[self._tops(token) for token in shown] if self._num_top else None,
            text_offset=[token.begin for token in shown],
        )

    def _tops(self, shown: ShownToken) -> dict[str, float] | None:
        """Return the likeliest tokens, then the sampled one if it is not among them, as OpenAI's API does; None at the
        first token of a prompt.
        """
        if shown.is_prompt and math.isnan(shown.logprob):
            return None
        found: dict[str, float] = {}
        for token, logprob in shown.top:
            found.setdefault(self._name(token), plain_logprob(logprob))
        if not math.isnan(shown.logprob):
            found.setdefault(self._name(shown.token), plain_logprob(shown.logprob))
        return found


class _Prepared(NamedTuple):
    model: str
    options: GenerationOptions
    echoes: bool
    texts: list[str]
    """The prompts that are texts. The server encodes them: its threads run beside the event loop, and their work ends
    when the client leaves.
    """
    ids: list[Int32s]
    """The prompts that are ids."""


_decoder = BodyDecoder(CompletionRequest)


async def _prepare(preparation: Preparation, body: bytes) -> _Prepared:
    request = preparation.decode(_decoder, body)
    options = _check(request, preparation.engine.limits)
    texts, ids = await preparation.make_encoder(options).read_prompt(request.prompt)
    return _Prepared(request.model, options, bool(request.echo), texts, ids)


PREPARER = Preparer("completions", _prepare, _Prepared)


class Completions:
    """Answers completions."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def answer(self, exchange: Exchange) -> None:
        """Answer one request. Raises ApiError and ClientGoneError."""
        service = self._service
        engine = service.serving_engine()
        body = await exchange.read_json(service.budget)
        prepared = await service.prepare(exchange, PREPARER, body)
        model, options, echoes, texts, ids = prepared
        await service.check_grammar(exchange, engine, options)
        encoder = engine.make_encoder(options, exchange.connection)
        prompts, texts = await encoder.encode_prompt(texts, ids, with_text=echoes)
        spec = engine.limits.plan(options, prompts, "prompt", DEFAULT_MAX_TOKENS)
        job = engine.make_job(prompts, spec, options, CompletionFormat, model, texts)
        await run_job(job, exchange, service.streams, service.metrics)


def _check(request: CompletionRequest, limits: Limits) -> GenerationOptions:
    """Check everything but the prompt."""
    return check_shared(
        request,
        limits,
        max_tokens=request.max_tokens,
        max_tokens_field="max_tokens",
        num_logprobs=int_in(request.logprobs, "logprobs", 0, limits.max_top_logprobs(), -1),
        echoes=bool(request.echo),
    )
