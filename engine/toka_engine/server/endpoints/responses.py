"""`POST /v1/responses`, and the count of a prompt's tokens."""

from __future__ import annotations

import re
import time
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec

from toka_engine.server.answers import encode
from toka_engine.server.chat_plan import ChatPlan, ChatRequest, plan_chat
from toka_engine.server.decoding import BodyDecoder
from toka_engine.server.endpoints.responses_answers import Response, ResponsesFormat
from toka_engine.server.errors import ApiError, invalid
from toka_engine.server.exchange import Exchange
from toka_engine.server.generate import run_job
from toka_engine.server.keys.check import owner_of
from toka_engine.server.large_requests import Preparer
from toka_engine.server.preparation import Preparation
from toka_engine.server.request import Hints, Penalty, RepetitionPenalty, Seed, Share, Temperature, Timeout, doc
from toka_engine.server.responses.input import read_items
from toka_engine.server.responses.items import new_id
from toka_engine.server.responses.store import StoredResponse
from toka_engine.server.responses.tools import ResponseTools, read_tools
from toka_engine.server.service import Service

V = TypeVar("V")

PATH = "/v1/responses"
COUNT_PATH = "/v1/responses/input_tokens"
_LOGPROBS = "message.output_text.logprobs"
_INCLUDABLE = (_LOGPROBS, "reasoning.encrypted_content")


class TextOptions(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The form of the answer's text."""

    format: Annotated[dict[str, Any] | None, doc("Of type text, json_object or json_schema.")] = None
    verbosity: Annotated[str | None, doc("A hint without effect.")] = None


class ReasoningOptions(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Wishes for the model's reasoning."""

    effort: Annotated[str | None, doc("The chat template gets it as `reasoning_effort`.")] = None
    summary: Annotated[str | None, doc("A hint without effect: reasoning is given as it is.")] = None
    generate_summary: Annotated[str | None, doc("As `summary`.")] = None


class ResponsesStreamOptions(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Options of a streamed response."""

    include_obfuscation: Annotated[bool | None, doc("A hint without effect: events are never padded.")] = None


class ResponsesRequest(Hints, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The body of a request for a response."""

    model: Annotated[str, doc("The served name or an alias.")]
    input: Annotated[str | list[Any], doc("A text, or items: messages, calls and their outputs, reasoning.")]
    instructions: Annotated[str | None, doc("A system message before the input; not part of what is continued.")] = None
    max_output_tokens: Annotated[int | None, doc("From 1. The prompt and these together must fit.")] = None
    temperature: Annotated[Temperature | None, doc("0 is greedy.")] = None
    top_p: Annotated[Share | None, doc("0 is greedy.")] = None
    top_k: Annotated[int | None, doc("-1 to the vocabulary's size; 0 and -1: all.")] = None
    min_p: Annotated[Share | None, doc("0: off.")] = None
    frequency_penalty: Annotated[Penalty | None, doc("0: off.")] = None
    presence_penalty: Annotated[Penalty | None, doc("0: off.")] = None
    repetition_penalty: Annotated[RepetitionPenalty | None, doc("1: off.")] = None
    seed: Annotated[Seed | None, doc("Of a negative one the lower 63 bits count.")] = None
    top_logprobs: Annotated[int | None, doc("0 to `max_topk_logprobs`; asks for logprobs.")] = None
    include: Annotated[list[str] | None, doc("`message.output_text.logprobs`; other parts do not exist here.")] = None
    text: Annotated[TextOptions | None, doc("The form of the text.")] = None
    reasoning: Annotated[ReasoningOptions | None, doc("Wishes for the reasoning.")] = None
    tools: Annotated[list[Any] | None, doc("Functions and custom tools; hosted ones have no effect.")] = None
    tool_choice: Annotated[
        str | dict[str, Any] | None, doc("`auto`, `none`, `required`, one function, or `allowed_tools`.")
    ] = None
    parallel_tool_calls: Annotated[bool | None, doc("False: at most one call.")] = None
    max_tool_calls: Annotated[int | None, doc("A hint without effect: it limits hosted tools.")] = None
    truncation: Annotated[
        Literal["auto", "disabled"] | None, doc("`auto`: the oldest turns are left out where all do not fit.")
    ] = None
    previous_response_id: Annotated[str | None, doc("The response that this one continues.")] = None
    store: Annotated[bool | None, doc("False: the response is not kept.")] = None
    timeout_s: Timeout = None
    stream: Annotated[bool | None, doc("Server-sent events.")] = None
    stream_options: Annotated[ResponsesStreamOptions | None, doc("Only together with `stream`.")] = None


class InputTokensRequest(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The body of a request for the number of a response's input tokens: the fields that make the prompt."""

    model: Annotated[str | None, doc("The served name or an alias; may be left out.")] = None
    input: Annotated[str | list[Any] | None, doc("As for a response.")] = None
    instructions: Annotated[str | None, doc("As for a response.")] = None
    previous_response_id: Annotated[str | None, doc("As for a response.")] = None
    text: Annotated[TextOptions | None, doc("Checked as for a response; it adds nothing to the prompt.")] = None
    reasoning: Annotated[ReasoningOptions | None, doc("As for a response.")] = None
    tools: Annotated[list[Any] | None, doc("As for a response.")] = None
    tool_choice: Annotated[str | dict[str, Any] | None, doc("As for a response.")] = None
    parallel_tool_calls: Annotated[bool | None, doc("Checked as for a response.")] = None
    truncation: Annotated[Literal["auto", "disabled"] | None, doc("`auto`: what is left out is not counted.")] = None


class _Continued(msgspec.Struct):
    previous_response_id: str | None = None


class InputTokens(msgspec.Struct):
    """The number of tokens of a response's prompt."""

    input_tokens: int
    object: str = "response.input_tokens"


_decoder = BodyDecoder(ResponsesRequest, effective=("metadata",))
_count_decoder = BodyDecoder(InputTokensRequest)
_earlier_decoder = msgspec.json.Decoder(_Continued)


class _Prepared(NamedTuple):
    model: str
    plan: ChatPlan
    begun: Response
    """The response as it is before its first token."""
    custom_tools: frozenset[str]
    items: bytes | None
    """The items of the input as they are kept, in JSON; None: nothing is kept."""


async def _prepare(preparation: Preparation, body: bytes, earlier: list[bytes]) -> _Prepared:
    """Check and encode a request that continues the items of `earlier`."""
    request = preparation.decode(_decoder, body)
    tools = read_tools(request.tools or (), request.tool_choice)
    plan = await _plan(request, tools, earlier, preparation)
    sampling = plan.options.sampling
    begun = _begin(request, sampling.temperature, sampling.top_p)
    items = None if request.store is False else encode(_with_ids(request.input))
    return _Prepared(request.model, plan, begun, tools.custom, items)


async def _prepare_count(preparation: Preparation, body: bytes, earlier: list[bytes], model: str) -> ChatPlan:
    asked = preparation.decode(_count_decoder, body)
    fields = {name: getattr(asked, name) for name in asked.__struct_fields__}
    fields |= {"model": asked.model or model, "input": [] if asked.input is None else asked.input}
    request = ResponsesRequest(**fields, max_output_tokens=1)
    return await _plan(request, read_tools(request.tools or (), request.tool_choice), earlier, preparation)


async def _plan(
    request: ResponsesRequest, tools: ResponseTools, earlier: list[bytes], preparation: Preparation
) -> ChatPlan:
    """Check and encode, without the oldest turns where all do not fit and the request allows that."""
    preparation.note([*tools.ignored, *_find_ignored(request)])
    items = [item for part in earlier for item in msgspec.json.decode(part)]
    chat = _as_chat(request, items, tools)
    num_dropped = 1
    while True:
        try:
            return await plan_chat(chat, preparation)
        except ApiError as error:
            rest = _drop_oldest(chat.messages, num_dropped)
            may_drop = request.truncation == "auto" and error.code == "context_length_exceeded"
            if not may_drop or len(rest) == len(chat.messages):
                raise _renamed(error) from error
        chat = msgspec.structs.replace(chat, messages=rest)
        num_dropped *= 2


PREPARER = Preparer("responses", _prepare, _Prepared)
COUNT_PREPARER = Preparer("responses_count", _prepare_count, ChatPlan)


class Responses:
    """Answers requests for responses, and counts their tokens."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def answer(self, exchange: Exchange) -> None:
        """Answer one request. Raises ApiError and ClientGoneError."""
        service = self._service
        engine = service.serving_engine()
        body = await exchange.read_json(service.budget)
        prepared = await self._make_ready(exchange, PREPARER, body)
        await self._check_grammar(exchange, prepared.plan)
        form = partial(
            ResponsesFormat,
            response=prepared.begun,
            custom_tools=prepared.custom_tools,
            keep=partial(self._keep, owner_of(exchange), prepared.items),
        )
        job = prepared.plan.make_job(engine, prepared.model, None, form)
        job = msgspec.structs.replace(job, includes_usage=True)
        await run_job(job, exchange, service.streams, service.metrics)

    async def count(self, exchange: Exchange) -> None:
        """Answer with the number of a prompt's tokens. Raises ApiError and ClientGoneError."""
        service = self._service
        service.serving_engine()
        body = await exchange.read_json(service.budget)
        plan = await self._make_ready(exchange, COUNT_PREPARER, body, service.names[0])
        await self._check_grammar(exchange, plan)
        await exchange.answer(200, encode(InputTokens(len(plan.prompts[0]))))

    async def _make_ready(self, exchange: Exchange, preparer: Preparer[V], body: bytes | bytearray, *further: Any) -> V:
        """Return what `preparer` makes of the request, with the items of the conversation that it continues."""
        service = self._service
        earlier: list[bytes] = []
        if (continued := _find_continued(body)) is not None:
            earlier = service.responses.items_until(owner_of(exchange), continued)
        num_bytes = sum(map(len, earlier))
        return await service.prepare(exchange, preparer, body, earlier, *further, num_further_bytes=num_bytes)

    async def _check_grammar(self, exchange: Exchange, plan: ChatPlan) -> None:
        try:
            await self._service.check_grammar(exchange, self._service.serving_engine(), plan.options)
        except ApiError as error:
            raise _renamed(error) from error

    def _keep(self, owner: str, items: bytes | None, response: Response, body: bytes) -> None:
        if items is not None:
            stored = StoredResponse(owner, body, items, encode(response.output), response.previous_response_id)
            self._service.responses.put(response.id, stored)


def _find_continued(body: bytes | bytearray) -> str | None:
    """Return the id of the response that a request continues. What is wrong with the body is said later."""
    try:
        return _earlier_decoder.decode(body).previous_response_id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


# ---------------------------------------------------------------- the request


def _find_ignored(request: ResponsesRequest) -> list[str]:
    """Return the names of fields whose values have no effect here."""
    ignored = ["include"] if any(name != _LOGPROBS for name in request.include or ()) else []
    if request.max_tool_calls is not None:
        ignored.append("max_tool_calls")
    if request.reasoning is not None:
        ignored += [f"reasoning.{name}" for name in ("summary", "generate_summary") if getattr(request.reasoning, name)]
    if request.text is not None and request.text.verbosity is not None:
        ignored.append("text.verbosity")
    return ignored


def _as_chat(request: ResponsesRequest, earlier: list[Any], tools: ResponseTools) -> ChatRequest:
    """Return the same conversation as a chat."""
    messages = [*read_items(earlier, "previous_response_id"), *read_items(request.input)]
    if not messages:
        raise invalid("input", "'input' is empty.")
    has_logprobs = request.top_logprobs is not None or _LOGPROBS in (request.include or ())
    return ChatRequest(
        model=request.model,
        messages=_merge_system(request.instructions, messages),
        max_completion_tokens=request.max_output_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        frequency_penalty=request.frequency_penalty,
        presence_penalty=request.presence_penalty,
        repetition_penalty=request.repetition_penalty,
        seed=request.seed,
        logprobs=has_logprobs or None,
        top_logprobs=request.top_logprobs,
        tools=tools.tools or None,
        tool_choice=tools.choice,
        parallel_tool_calls=request.parallel_tool_calls,
        response_format=_as_response_format(request.text.format if request.text is not None else None),
        reasoning_effort=request.reasoning.effort if request.reasoning is not None else None,
        stream=request.stream,
        service_tier=request.service_tier,
        timeout_s=request.timeout_s,
    )


def _as_response_format(form: dict[str, Any] | None) -> msgspec.Raw:
    """Return `text.format` as a chat has it: with the parts of a schema one level deeper."""
    if form is not None and form.get("type") == "json_schema":
        parts = {key: value for key, value in form.items() if key != "type" and value is not None}
        form = {"type": "json_schema", "json_schema": parts}
    return msgspec.Raw(encode(form))


def _merge_system(instructions: str | None, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with the instructions before them; system messages at the beginning become one, since many
    templates take no more.
    """
    texts = [instructions] if instructions else []
    rest = list(messages)
    while rest and rest[0]["role"] in ("system", "developer"):
        texts.append(rest.pop(0)["content"])
    return [{"role": "system", "content": "\n\n".join(texts)}, *rest] if texts else rest


def _drop_oldest(messages: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return the messages without the first `count` turns, each from one message of the user to the next; system
    messages and the last turn stay.
    """
    begin = next((index for index, message in enumerate(messages) if message["role"] != "system"), len(messages))
    turns = [index for index in range(begin + 1, len(messages)) if messages[index]["role"] == "user"]
    return messages[:begin] + messages[turns[min(count, len(turns)) - 1] :] if turns else messages


def _renamed(error: ApiError) -> ApiError:
    """Return an error of the chat with the names that a response's fields have."""
    message, param = error.message, error.param
    names = {
        "messages": "input",
        "max_completion_tokens": "max_output_tokens",
        "reasoning_effort": "reasoning.effort",
        "response_format": "text.format",
    }
    for name, ours in names.items():
        if param is not None and param.partition("[")[0].partition(".")[0] == name:
            message, param = re.sub(rf"'{name}[^']*'", f"'{ours}'", message), ours
    return ApiError(error.status, message, param=param, code=error.code, headers=error.headers)


def _begin(request: ResponsesRequest, temperature: float, top_p: float) -> Response:
    """Return the response as it is before its first token."""
    text = request.text.format if request.text is not None else None
    reasoning = request.reasoning or ReasoningOptions()
    return Response(
        id=new_id("resp"),
        created_at=int(time.time()),
        instructions=request.instructions,
        max_output_tokens=request.max_output_tokens,
        max_tool_calls=request.max_tool_calls,
        metadata=request.metadata or {},
        model=request.model,
        parallel_tool_calls=request.parallel_tool_calls is not False,
        previous_response_id=request.previous_response_id,
        reasoning={"effort": reasoning.effort, "summary": reasoning.summary},
        service_tier="flex" if request.service_tier == "flex" else "default",
        store=request.store is not False,
        temperature=temperature,
        text={"format": text or {"type": "text"}},
        tool_choice=request.tool_choice or "auto",
        tools=request.tools or [],
        top_logprobs=request.top_logprobs or 0,
        top_p=top_p,
        truncation=request.truncation or "disabled",
        user=request.user,
    )


def _with_ids(items: str | list[Any]) -> list[Any]:
    """Return the input as items that all have an id, a type and a status."""
    if isinstance(items, str):
        items = [{"role": "user", "content": [{"type": "input_text", "text": items}]}]
    kinds = {"message": "msg", "function_call": "fc", "reasoning": "rs"}
    return [
        {**item, "type": kind, "id": item.get("id") or new_id(kinds.get(kind, "item")), "status": "completed"}
        for item in items
        for kind in [item.get("type") or "message"]
    ]
