"""The parts of the server process that its endpoints work with."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import msgspec

from toka_engine.config import EngineConfig
from toka_engine.messages import EngineInfo, Int32s
from toka_engine.server.answers import AnswerFormat
from toka_engine.server.chat_template import ChatTemplate
from toka_engine.server.connection import Connection
from toka_engine.server.decoding import BodyDecoder
from toka_engine.server.dialect import Dialect
from toka_engine.server.exchange import BodyBudget, Exchange
from toka_engine.server.fields import COUNTED
from toka_engine.server.generate import GenerationJob
from toka_engine.server.generation_spec import GenerationSpec
from toka_engine.server.grammar_checks import GrammarChecks
from toka_engine.server.health import Health
from toka_engine.server.limits import GenerationOptions, Limits
from toka_engine.server.metrics import Metrics
from toka_engine.server.prompt_logprobs import NO_PROMPT_LOGPROBS, PromptLogprobForms
from toka_engine.server.prompts import PromptEncoder
from toka_engine.server.render import EmptyRenderer, Renderer, TrackingRenderer
from toka_engine.server.responses.store import ResponseStore
from toka_engine.server.streams import Streams
from toka_engine.server.tokenization import Tokenizer
from toka_engine.server.vllm_metrics import VllmMetrics
from toka_engine.version import __version__

R = TypeVar("R")

_TOTAL_BODIES = 8
"""The number of bodies of the largest size that may be held at once."""


class Engine(msgspec.Struct, frozen=True):
    """The parts that exist once the engine has started."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    limits: Limits
    dialect: Dialect
    fingerprint: str
    """The `system_fingerprint` of answers: equal where version, model and number format are."""
    grammar_checks: GrammarChecks

    def make_encoder(self, options: GenerationOptions, connection: Connection) -> PromptEncoder:
        """Return what encodes the prompts of one request."""
        return PromptEncoder(
            self.tokenizer,
            self.limits,
            connection,
            adds_special_tokens=options.adds_special_tokens,
            truncation=options.truncation,
        )

    def make_job(
        self,
        prompts: Sequence[Int32s],
        spec: GenerationSpec,
        options: GenerationOptions,
        form: Callable[..., AnswerFormat],
        model: str,
        echoes: Sequence[str] = (),
    ) -> GenerationJob:
        """Return the checked request, ready to run; `form` writes its answer."""
        return GenerationJob(
            prompts,
            spec,
            form(
                model,
                self.tokenizer.label_of,
                has_logprobs=options.sampling.num_logprobs >= 0,
                num_top=options.sampling.num_logprobs,
                includes_usage=options.includes_usage or options.reports_usage_each,
                names_token_ids=options.names_token_ids,
                fingerprint=self.fingerprint,
                prompts=prompts if options.returns_token_ids else None,
                num_choices=options.num_choices,
                is_streamed=options.is_streamed,
            ),
            self.renderer_maker(options, self.tokenizer.bytes_of),
            options.is_streamed,
            options.includes_usage,
            options.reports_usage_each,
            echoes,
            options.num_choices,
            NO_PROMPT_LOGPROBS
            if spec.prompt_logprobs < 0
            else PromptLogprobForms(
                self.tokenizer.bytes_of, self.tokenizer.label_of, options.echo_logprobs, options.prompt_logprobs
            ),
        )

    def renderer_maker(self, options: GenerationOptions, bytes_of: Sequence[bytes]) -> Callable[[], Renderer]:
        """Return what makes the renderer of a choice; `bytes_of`: the bytes that each token shows."""
        if options.max_tokens == 0:
            return lambda: EmptyRenderer(bytes_of)
        if options.shows_special:
            bytes_of = self.tokenizer.bytes_with_specials
        keeps_tokens = options.sampling.num_logprobs >= 0 or options.returns_token_ids or bool(options.best_of)
        if options.stops is None and not keeps_tokens:
            return partial(Renderer, bytes_of)
        return lambda: TrackingRenderer(
            bytes_of,
            options.stops,
            keeps_tokens=keeps_tokens,
            keeps_stop=options.keeps_stop,
            min_tokens=options.rules.min_tokens,
        )


def fingerprint_of(config: EngineConfig, info: EngineInfo) -> str:
    """Return the `system_fingerprint` of an engine: a hash of what decides about its numbers."""
    parts = (__version__, config.model, config.revision, info.device, info.dtype, info.vocab_size)
    return "fp_" + hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


class Service:
    """The state that all endpoints share. `engine` is set when `EngineInfo` has come."""

    def __init__(self, config: EngineConfig, names: tuple[str, ...], health: Health, streams: Streams) -> None:
        self.engine: Engine | None = None
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
