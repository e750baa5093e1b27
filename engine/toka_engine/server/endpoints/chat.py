"""`POST /v1/chat/completions`."""

from __future__ import annotations

from functools import partial

from toka_engine.server.chat_plan import ChatRequest, prepare_chat
from toka_engine.server.decoding import BodyDecoder
from toka_engine.server.endpoints.chat_answers import ChatFormat, SplitChatFormat
from toka_engine.server.exchange import Exchange
from toka_engine.server.generate import run_job
from toka_engine.server.service import Service

PATH = "/v1/chat/completions"


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
        plan = await prepare_chat(request, engine, exchange, service)
        new_form = partial(SplitChatFormat, reasoning_field=engine.dialect.reasoning_field)
        job = plan.make_job(engine, request.model, ChatFormat, new_form)
        await run_job(job, exchange, service.streams, service.metrics)
