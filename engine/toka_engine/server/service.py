"""The parts of the server process that its endpoints work with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, TypeVar

from toka_engine.config import EngineConfig
from toka_engine.server.decoding import BodyDecoder
from toka_engine.server.engine import Engine
from toka_engine.server.exchange import BodyBudget, Exchange
from toka_engine.server.fields import COUNTED
from toka_engine.server.health import Health
from toka_engine.server.large_requests import LargeRequests, Preparer, is_large
from toka_engine.server.limits import GenerationOptions
from toka_engine.server.metrics import Metrics
from toka_engine.server.preparation import Preparation
from toka_engine.server.responses.store import ResponseStore
from toka_engine.server.streams import Streams
from toka_engine.server.vllm_metrics import VllmMetrics

R = TypeVar("R")
V = TypeVar("V")

_TOTAL_BODIES = 8
"""The number of bodies of the largest size that may be held at once."""


class Service:
    """The state that all endpoints share. `engine` and `large_requests` are set when `EngineInfo` has come."""

    def __init__(self, config: EngineConfig, names: tuple[str, ...], health: Health, streams: Streams) -> None:
        self.engine: Engine | None = None
        self.large_requests: LargeRequests | None = None
        self._reports_unknown = config.unknown_fields == "report"
        self.names = names
        """The models' names that requests may give, the main one first."""
        self.health = health
        self.streams = streams
        self.metrics = Metrics(lambda: health.is_ready, lambda: streams.num_generations, streams.replicas)
        if config.vllm_metric_names:
            vllm = VllmMetrics(names[0], streams.replicas, config.page_size, has_prefix_cache=config.use_prefix_cache)
            self.metrics.add_vllm_names(vllm)
        self.budget = BodyBudget(config.max_body_bytes, _TOTAL_BODIES * config.max_body_bytes)
        self.created_s = int(time.time())
        self.responses = ResponseStore(config.response_store_bytes)

    async def read(self, exchange: Exchange, decoder: BodyDecoder[R]) -> R:
        """Return the request in the body of `exchange`; the answer will name what has no effect. Raises a 4xx, and
        ClientGoneError.
        """
        request, ignored = decoder.decode(await exchange.read_json(self.budget), reports_unknown=self._reports_unknown)
        if ignored:
            self.note_ignored(exchange, ignored)
        return request

    async def prepare(
        self,
        exchange: Exchange,
        preparer: Preparer[V],
        body: bytes | bytearray,
        *further: Any,
        num_further_bytes: int = 0,
    ) -> V:
        """Return what `preparer` makes of a request, in another process where it is large; the answer will name what
        has no effect. `num_further_bytes`: the size of `further`. Raises a 4xx, and ClientGoneError.
        """
        preparation = Preparation(self.serving_engine(), exchange.connection, reports_unknown=self._reports_unknown)
        try:
            if self.large_requests is not None and is_large(body, num_further_bytes):
                return await self.large_requests.prepare(preparer, preparation, body, further)
            return await preparer.prepare(preparation, body, *further)
        finally:
            if preparation.ignored:
                self.note_ignored(exchange, preparation.ignored)

    async def check_grammar(self, exchange: Exchange, engine: Engine, options: GenerationOptions) -> None:
        """Have the request's grammar compiled; the answer will name keywords that are not enforced. Raises a 4xx."""
        if options.grammar is not None:
            engine.limits.check_fits_grammar(options, options.grammar.param)
            dropped = await engine.grammar_checks.check(engine.limits.complete_grammar(options.grammar))
            self.note_ignored(exchange, [f"{options.grammar.param}.{keyword}" for keyword in dropped])

    def note_ignored(self, exchange: Exchange, names: Sequence[str]) -> None:
        """Name fields without effect in the answer, and count them."""
        exchange.ignore(names)
        for name in names:
            base = name.partition(".")[0].partition("[")[0]
            self.metrics.ignored_fields.labels(base if base in COUNTED else "other").inc()

    def serving_engine(self) -> Engine:
        """Return the engine. Raises a 503 unless it takes requests."""
        self.health.check_serving()
        if self.engine is None:
            raise AssertionError("serving without EngineInfo")
        return self.engine
