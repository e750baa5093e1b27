"""`POST /v1/messages`, Anthropic's Messages API, and the count of a prompt's tokens: text and tools."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from toka_engine.server.chat_plan import ChatPlan, ChatRequest, plan_chat
from toka_engine.server.decoding import BodyDecoder
from toka_engine.server.endpoints.messages_answers import MessageFormat
from toka_engine.server.errors import ApiError, invalid
from toka_engine.server.exchange import Exchange
from toka_engine.server.generate import run_job
from toka_engine.server.large_requests import Preparer
from toka_engine.server.message_input import read_choice, read_messages, read_tools
from toka_engine.server.preparation import Preparation
from toka_engine.server.request import MAX_STOP_STRINGS, ServiceTier, Share, Timeout, doc
from toka_engine.server.service import Service

PATH = "/v1/messages"
COUNT_PATH = "/v1/messages/count_tokens"


class MessagesRequest(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The body of a request for a message."""

    model: Annotated[str, doc("The served name or an alias.")]
    messages: Annotated[list[Any], doc("Roles user and assistant; blocks text, thinking, tool_use, tool_result.")]
    max_tokens: Annotated[int | None, doc("From 1. The prompt and these together must fit.")] = None
    system: Annotated[str | list[Any] | None, doc("A text, or blocks of text.")] = None
    stop_sequences: Annotated[list[str] | None, doc(f"Up to {MAX_STOP_STRINGS} texts.")] = None
    stream: Annotated[bool | None, doc("Server-sent events.")] = None
    temperature: Annotated[Annotated[float, Meta(ge=0, le=2)] | None, doc("0 is greedy.")] = None
    top_p: Annotated[Share | None, doc("0 is greedy.")] = None
    top_k: Annotated[int | None, doc("-1 to the vocabulary's size; 0 and -1: all.")] = None
    tools: Annotated[list[Any] | None, doc("Functions; tools that a server would run have no effect.")] = None
    tool_choice: Annotated[dict[str, Any] | None, doc("Of type auto, any, tool or none.")] = None
    thinking: Annotated[dict[str, Any] | None, doc("Without effect: the chat template decides.")] = None
    metadata: Annotated[dict[str, Any] | None, doc("A hint without effect, named in `x-toka-ignored`.")] = None
    service_tier: ServiceTier = None
    timeout_s: Timeout = None


class TokenCount(msgspec.Struct):
    """The number of tokens of a prompt."""

    input_tokens: int


_decoder = BodyDecoder(MessagesRequest)


class _Prepared(NamedTuple):
    model: str
    stops: tuple[str, ...]
    plan: ChatPlan


async def _prepare(preparation: Preparation, body: bytes) -> _Prepared:
    request = preparation.decode(_decoder, body)
    if request.max_tokens is None:
        raise invalid("max_tokens", "Missing required field: 'max_tokens'.", "missing_required_parameter")
    return _Prepared(request.model, tuple(request.stop_sequences or ()), await _plan(request, preparation))


async def _prepare_count(preparation: Preparation, body: bytes) -> ChatPlan:
    request = preparation.decode(_decoder, body)
    return await _plan(msgspec.structs.replace(request, max_tokens=1), preparation)


async def _plan(request: MessagesRequest, preparation: Preparation) -> ChatPlan:
    tools, ignored = read_tools(request.tools or ())
    if request.thinking is not None:
        ignored.append("thinking")
    preparation.note(ignored)
    choice = request.tool_choice or {}
    chat = ChatRequest(
        model=request.model,
        messages=read_messages(request.messages, request.system),
        max_tokens=request.max_tokens,
        stop=msgspec.Raw(msgspec.json.encode(request.stop_sequences)),
        stream=request.stream,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        tools=tools or None,
        tool_choice=read_choice(request.tool_choice),
        service_tier=request.service_tier,
        timeout_s=request.timeout_s,
        parallel_tool_calls=False if choice.get("disable_parallel_tool_use") is True else None,
    )
    try:
        return await plan_chat(chat, preparation)
    except ApiError as error:
        if error.param == "stop":
            message = error.message.replace("'stop'", "'stop_sequences'")
            raise ApiError(error.status, message, param="stop_sequences", code=error.code) from error
        raise


PREPARER = Preparer("messages", _prepare, _Prepared)
COUNT_PREPARER = Preparer("messages_count", _prepare_count, ChatPlan)


class Messages:
    """Answers requests for messages, and counts their tokens."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def answer(self, exchange: Exchange) -> None:
        """Answer one request. Raises ApiError and ClientGoneError."""
        service = self._service
        engine = service.serving_engine()
        body = await exchange.read_json(service.budget)
        prepared = await service.prepare(exchange, PREPARER, body)
        plan = prepared.plan
        await service.check_grammar(exchange, engine, plan.options)
        form = partial(MessageFormat, num_prompt_tokens=len(plan.prompts[0]), stop_sequences=prepared.stops)
        job = msgspec.structs.replace(plan.make_job(engine, prepared.model, None, form), includes_usage=True)
        await run_job(job, exchange, service.streams, service.metrics)

    async def count(self, exchange: Exchange) -> None:
        """Answer with the number of the prompt's tokens. Raises ApiError and ClientGoneError."""
        service = self._service
        engine = service.serving_engine()
        plan = await service.prepare(exchange, COUNT_PREPARER, await exchange.read_json(service.budget))
        await service.check_grammar(exchange, engine, plan.options)
        await exchange.answer(200, msgspec.json.encode(TokenCount(len(plan.prompts[0]))))
