"""`POST /v1/responses`, and the responses that are kept: reading them, their input, deleting them."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

import msgspec

from toka_engine.server.answers import encode
from toka_engine.server.chat_plan import ChatPlan, ChatRequest, prepare_chat
from toka_engine.server.decoding import BodyDecoder
from toka_engine.server.endpoints.responses_answers import Response, ResponsesFormat
from toka_engine.server.errors import ApiError, invalid
from toka_engine.server.exchange import Exchange
from toka_engine.server.generate import run_job
from toka_engine.server.keys.check import owner_of
from toka_engine.server.paging import read_page
from toka_engine.server.request import Hints, Penalty, RepetitionPenalty, Seed, Share, Temperature, Timeout, doc
from toka_engine.server.responses.input import read_items
from toka_engine.server.responses.items import new_id
from toka_engine.server.responses.store import StoredResponse
from toka_engine.server.responses.tools import ResponseTools, read_tools
from toka_engine.server.service import Engine, Service

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


class InputTokens(msgspec.Struct):
    """The number of tokens of a response's prompt."""

    input_tokens: int
    object: str = "response.input_tokens"


class Responses:
    """Answers requests for responses, and counts their tokens."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._decoder = BodyDecoder(ResponsesRequest, effective=("metadata",))
        self._count_decoder = BodyDecoder(InputTokensRequest)

    async def answer(self, exchange: Exchange) -> None:
        """Answer one request. Raises ApiError and ClientGoneError."""
        service = self._service
        engine = service.serving_engine()
        request = await service.read(exchange, self._decoder)
        tools = read_tools(request.tools or (), request.tool_choice)
        plan = await self._plan(request, tools, engine, exchange)
        sampling = plan.options.sampling
        form = partial(
            ResponsesFormat,
            response=_begin(request, sampling.temperature, sampling.top_p),
            custom_tools=tools.custom,
            keep=partial(self._keep, owner_of(exchange), request),
        )
        job = plan.make_job(engine, request.model, None, form)
        job = msgspec.structs.replace(job, includes_usage=True)
        await run_job(job, exchange, service.streams, service.metrics)

    async def count(self, exchange: Exchange) -> None:
        """Answer with the number of a prompt's tokens. Raises ApiError and ClientGoneError."""
        engine = self._service.serving_engine()
        asked = await self._service.read(exchange, self._count_decoder)
        fields = {name: getattr(asked, name) for name in asked.__struct_fields__}
        fields |= {"model": asked.model or self._service.names[0], "input": [] if asked.input is None else asked.input}
        request = ResponsesRequest(**fields, max_output_tokens=1)
        plan = await self._plan(request, read_tools(request.tools or (), request.tool_choice), engine, exchange)
        await exchange.answer(200, encode(InputTokens(len(plan.prompts[0]))))

    async def _plan(
        self, request: ResponsesRequest, tools: ResponseTools, engine: Engine, exchange: Exchange
    ) -> ChatPlan:
        """Check and encode the request, with what it continues; the answer will name what has no effect."""
        service = self._service
        service.note_ignored(exchange, [*tools.ignored, *_find_ignored(request)])
        earlier: list[Any] = []
        if request.previous_response_id is not None:
            earlier = service.responses.items_until(owner_of(exchange), request.previous_response_id)
        return await self._prepare(request, _as_chat(request, earlier, tools), engine, exchange)

    async def _prepare(
        self, request: ResponsesRequest, chat: ChatRequest, engine: Engine, exchange: Exchange
    ) -> ChatPlan:
        """Check and encode, without the oldest turns where all do not fit and the request allows that."""
        num_dropped = 1
        while True:
            try:
                return await prepare_chat(chat, engine, exchange, self._service)
            except ApiError as error:
                rest = _drop_oldest(chat.messages, num_dropped)
                may_drop = request.truncation == "auto" and error.code == "context_length_exceeded"
                if not may_drop or len(rest) == len(chat.messages):
                    raise _renamed(error) from error
            chat = msgspec.structs.replace(chat, messages=rest)
            num_dropped *= 2

    def _keep(self, owner: str, request: ResponsesRequest, response: Response, body: bytes) -> None:
        if request.store is False:
            return
        items = encode(_with_ids(request.input))
        stored = StoredResponse(owner, body, items, encode(response.output), request.previous_response_id)
        self._service.responses.put(response.id, stored)


class ItemList(msgspec.Struct):
    """Items of a kept response's input."""

    data: list[Any]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: str = "list"


class Deleted(msgspec.Struct):
    """The answer to the deletion of a response."""

    id: str
    object: str = "response"
    deleted: bool = True


def find_response(service: Service, exchange: Exchange, response_id: str) -> bytes:
    """Return the body of a response that is kept for the caller. Raises a 404."""
    return service.responses.get(owner_of(exchange), response_id).body


def delete_response(service: Service, exchange: Exchange, response_id: str) -> Deleted:
    """Drop a response that is kept for the caller. Raises a 404."""
    service.responses.delete(owner_of(exchange), response_id)
    return Deleted(response_id)


def list_input_items(service: Service, exchange: Exchange, response_id: str, query: Mapping[str, str]) -> ItemList:
    """Return items of the input of a kept response. Raises a 404, and a 400 that names the parameter."""
    wanted = read_page(query, 20, 100)
    items = msgspec.json.decode(service.responses.get(owner_of(exchange), response_id).input_items)
    if not wanted.is_ascending:
        items.reverse()
    if wanted.after is not None:
        places = [index for index, item in enumerate(items) if item["id"] == wanted.after]
        if not places:
            raise invalid("after", "'after' is not the id of an item of this response.", "invalid_value")
        items = items[places[0] + 1 :]
    page = items[: wanted.limit]
    ids = [item["id"] for item in page] or [None]
    return ItemList(page, ids[0], ids[-1], len(items) > wanted.limit)


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
