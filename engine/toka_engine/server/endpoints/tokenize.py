"""`POST /tokenize`, `POST /detokenize` and `GET /tokenizer_info`, in vLLM's shape: the tokenizer, without the model."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from toka_engine.messages import Int32s
from toka_engine.server.conversation import check_messages
from toka_engine.server.decoding import BodyDecoder
from toka_engine.server.engine import Engine
from toka_engine.server.errors import invalid
from toka_engine.server.exchange import Exchange
from toka_engine.server.large_requests import Preparer
from toka_engine.server.preparation import Preparation
from toka_engine.server.prompts import PromptEncoder
from toka_engine.server.request import doc
from toka_engine.server.service import Service
from toka_engine.server.template_variables import (
    AddGenerationPrompt,
    ContinueFinalMessage,
    Documents,
    ReasoningEffort,
    TemplateKwargs,
    check_template_variables,
)
from toka_engine.server.tools import check_tools

TOKENIZE_PATH = "/tokenize"
DETOKENIZE_PATH = "/detokenize"
INFO_PATH = "/tokenizer_info"
_MAX_IDS = 1024 * 1024
PATHS = (TOKENIZE_PATH, DETOKENIZE_PATH, INFO_PATH)


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The body of /tokenize: a text, or a conversation that the chat template renders."""

    model: Annotated[str | None, doc("The served name or an alias; may be left out.")] = None
    prompt: Annotated[str | None, doc("A text; this or `messages`.")] = None
    messages: Annotated[list[dict[str, Any]] | None, doc("A conversation, as in chat; this or `prompt`.")] = None
    add_special_tokens: Annotated[
        bool | None, doc("Add the tokenizer's own (BOS). True by default for a text, false for a conversation.")
    ] = None
    return_token_strs: Annotated[bool | None, doc("The answer has the text of each token, too.")] = None
    chat_template_kwargs: TemplateKwargs = None
    tools: Annotated[list[Any] | None, doc("Functions that the template describes to the model, as in chat.")] = None
    documents: Documents = None
    add_generation_prompt: AddGenerationPrompt = None
    continue_final_message: ContinueFinalMessage = None
    reasoning_effort: ReasoningEffort = None


class TokenizeAnswer(msgspec.Struct, frozen=True):
    """The tokens of a text or conversation."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The body of /detokenize."""

    model: Annotated[str | None, doc("The served name or an alias; may be left out.")] = None
    tokens: Annotated[list[int], Meta(max_length=_MAX_IDS, description="Token ids.")]


class DetokenizeAnswer(msgspec.Struct, frozen=True):
    """The text of some tokens; special tokens are written out."""

    prompt: str


class TokenizerInfo(msgspec.Struct, frozen=True):
    """The tokenizer, as clients need it to count and render by themselves."""

    vocab_size: int
    model_max_length: int
    chat_template: str | None
    bos_token: str | UnsetType = UNSET
    eos_token: str | UnsetType = UNSET


_decoder = BodyDecoder(TokenizeRequest)


async def _tokenize(preparation: Preparation, body: bytes) -> bytes:
    """Return the answer of /tokenize as JSON."""
    engine = preparation.engine
    request = preparation.decode(_decoder, body)
    if request.model is not None:
        engine.limits.check_model(request.model)
    if (request.prompt is None) == (request.messages is None):
        name = "prompt" if request.prompt is None else "messages"
        raise invalid(name, f"'{name}': exactly one of 'prompt' and 'messages' is needed.")
    encoder = PromptEncoder(
        engine.tokenizer,
        engine.limits,
        preparation.asker,
        adds_special_tokens=request.add_special_tokens,
        is_bounded=False,
    )
    if request.messages is None:
        ids = await encoder.encode_text(request.prompt or "")
    else:
        ids = await _encode_chat(preparation, request, request.messages, encoder)
    tokens: list[int] = ids.tolist()
    texts = [_label(engine, token) for token in tokens] if request.return_token_strs else None
    return msgspec.json.encode(TokenizeAnswer(len(tokens), engine.limits.max_request_tokens, tokens, texts))


async def _encode_chat(
    preparation: Preparation, request: TokenizeRequest, messages: list[dict[str, Any]], encoder: PromptEncoder
) -> Int32s:
    engine = preparation.engine
    template = engine.template
    if template is None:
        raise invalid("messages", "This model has no chat template.")
    turns, ignored = check_messages(messages, engine.limits)
    variables = check_template_variables(
        template,
        kwargs=request.chat_template_kwargs,
        documents=request.documents,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        reasoning_effort=request.reasoning_effort,
    )
    preparation.note(ignored + variables.ignored)
    tools = check_tools(request.tools, None, None)
    turns, given = engine.dialect.tools.prepare(turns, tools.tools if tools else ())
    ids, _ = await encoder.encode_chat(
        turns, template, {**given, **variables.values}, continues_final=variables.continues_final
    )
    return ids


PREPARER = Preparer("tokenize", _tokenize, bytes)


class Tokenizing:
    """Answers what is asked of the tokenizer."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._detokenize_decoder = BodyDecoder(DetokenizeRequest)

    async def tokenize(self, exchange: Exchange) -> None:
        """Answer /tokenize. Raises ApiError and ClientGoneError."""
        service = self._service
        service.serving_engine()
        body = await exchange.read_json(service.budget)
        answer = await service.prepare(exchange, PREPARER, body)
        await exchange.answer(200, answer)

    async def detokenize(self, exchange: Exchange) -> None:
        """Answer /detokenize. Raises ApiError and ClientGoneError."""
        engine = self._service.serving_engine()
        request = await self._service.read(exchange, self._detokenize_decoder)
        if request.model is not None:
            engine.limits.check_model(request.model)
        size = engine.limits.vocab_size
        if request.tokens and not 0 <= min(request.tokens) <= max(request.tokens) < size:
            raise invalid("tokens", f"'tokens' has an id that is not valid; valid are 0 to {size - 1}.")
        text = b"".join(map(engine.tokenizer.label_of, request.tokens)).decode("utf-8", "replace")
        await exchange.answer(200, msgspec.json.encode(DetokenizeAnswer(text)))

    async def describe(self, exchange: Exchange) -> None:
        """Answer /tokenizer_info. Raises ApiError."""
        engine = self._service.serving_engine()
        template = engine.template
        info = TokenizerInfo(
            vocab_size=engine.limits.vocab_size,
            model_max_length=engine.limits.max_request_tokens,
            chat_template=template.source if template else None,
            **(template.special_tokens if template else {}),
        )
        await exchange.answer(200, msgspec.json.encode(info))


def _label(engine: Engine, token: int) -> str:
    return engine.tokenizer.label_of(token).decode("utf-8", "replace")
