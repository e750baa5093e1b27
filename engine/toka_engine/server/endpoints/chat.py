"""`POST /v1/chat/completions`."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from toka_engine.server.chat_plan import ChatPlan, ChatRequest, plan_chat
from toka_engine.server.decoding import BodyDecoder
from toka_engine.server.endpoints.chat_answers import ChatFormat, SplitChatFormat
from toka_engine.server.exchange import Exchange
from toka_engine.server.generate import run_job
from toka_engine.server.large_requests import Preparer
from toka_engine.server.preparation import Preparation
from toka_engine.server.service import Service

PATH = "/v1/chat/completions"
_decoder = BodyDecoder(ChatRequest)


class _Prepared(NamedTuple):
    model: str
    plan: ChatPlan


async def _prepare(preparation: Preparation, body: bytes) -> _Prepared:
    request = preparation.decode(_decoder, body)
    return _Prepared(request.model, await plan_chat(request, preparation))


PREPARER = Preparer("chat", _prepare, _Prepared)


class ChatCompletions:
    """Answers chat completions."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def answer(self, exchange: Exchange) -> None:
        """Answer one request. Raises ApiError and ClientGoneError."""
        service = self._service
        engine = service.serving_engine()
        body = await exchange.read_json(service.budget)
        prepared = await service.prepare(exchange, PREPARER, body)
        await service.check_grammar(exchange, engine, prepared.plan.options)
        new_form = partial(SplitChatFormat, reasoning_field=engine.dialect.reasoning_field)
        job = prepared.plan.make_job(engine, prepared.model, ChatFormat, new_form)
        await run_job(job, exchange, service.streams, service.metrics)
