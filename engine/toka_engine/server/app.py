"""The routes, as one ASGI application. Nothing else: each body is a few calls into the other modules.

Plain ASGI with requests and answers by msgspec: on one core that takes four times the requests of a framework
with typed bodies. Every refusal, whoever raises it, becomes an answer here.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import msgspec

from toka_engine.config import EngineConfig
from toka_engine.server.access_log import log_request
from toka_engine.server.answers import ChatFormat, CompletionFormat
from toka_engine.server.auth import KeyCheck
from toka_engine.server.chat import ChatTemplate
from toka_engine.server.errors import ApiError, ClientGoneError, internal, invalid, no_model
from toka_engine.server.exchange import BodyBudget, Exchange
from toka_engine.server.generate import Job, run_job
from toka_engine.server.generation_defaults import describe_defaults
from toka_engine.server.health import Health
from toka_engine.server.limits import DEFAULT_COMPLETION_TOKENS, Asked, Limits
from toka_engine.server.metrics import CONTENT_TYPE, Metrics
from toka_engine.server.prompts import PromptEncoder
from toka_engine.server.protocol import BodyDecoder, ChatRequest, CompletionRequest
from toka_engine.server.render import Renderer, TrackingRenderer
from toka_engine.server.streams import Streams
from toka_engine.server.tokenization import Tokenizer

logger = logging.getLogger("toka.server")

Handler: TypeAlias = Callable[[Exchange], Awaitable[None]]
_CLIENT_GONE = 499
"""For the metrics only: what proxies write for a client that closed the connection before its answer."""
_MAX_MISTAKEN_PATH = 200
_TOTAL_BODIES = 8
"""Bodies of the largest size that may be held at once."""
_LOGGED_FRAMES = 30
"""Of a defect's traceback, the innermost: endless recursion has a thousand."""


class Engine(msgspec.Struct, frozen=True):
    """What the routes under /v1 need, once the engine has started."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    limits: Limits


class App:
    """The ASGI application. `engine` is set when `EngineInfo` has come."""

    def __init__(
        self,
        config: EngineConfig,
        names: tuple[str, ...],
        key_check: KeyCheck,
        health: Health,
        streams: Streams,
    ) -> None:
        self.engine: Engine | None = None
        self.metrics = Metrics(lambda: health.is_ready, lambda: streams.num_generations, streams.replicas)
        self._names = names
        self._key_check = key_check
        self._health = health
        self._streams = streams
        self._logs_requests = config.access_log
        self._budget = BodyBudget(config.max_body_bytes, _TOTAL_BODIES * config.max_body_bytes)
        self._completion_decoder = BodyDecoder(CompletionRequest)
        self._chat_decoder = BodyDecoder(ChatRequest)
        self._created_s = int(time.time())
        self._num_running = 0
        self._idle: asyncio.Event | None = None
        self._routes: dict[str, dict[str, Handler]] = {
            "/v1/completions": {"POST": self._completions},
            "/v1/chat/completions": {"POST": self._chat},
            "/v1/models": {"GET": self._models},
            "/ping": {"GET": self._ping},
            "/livez": {"GET": self._livez},
            "/readyz": {"GET": self._readyz},
            "/metrics": {"GET": self._metrics},
        }

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        exchange = Exchange(scope, receive, send)
        self._num_running += 1
        try:
            await self._route(exchange)
        except ApiError as error:
            await exchange.fail(error)
        except ClientGoneError:
            exchange.status = exchange.status or _CLIENT_GONE
            self.metrics.cancelled.inc()
        except Exception as error:  # the outermost point of one request: a defect of ours ends no other
            _log_defect(exchange, error)
            await exchange.fail(internal())
        finally:
            exchange.release()
            self._num_running -= 1
            if self._idle is not None and not self._num_running:
                self._idle.set()
            if exchange.path.startswith("/v1/"):
                self._count(exchange)
            if self._logs_requests:
                log_request(exchange)

    async def wait_idle(self) -> None:
        """Return when no request is being answered."""
        if self._num_running:
            self._idle = asyncio.Event()
            await self._idle.wait()

    def _count(self, exchange: Exchange) -> None:
        known = exchange.path in self._routes
        self.metrics.requests.labels(exchange.path if known else "other", str(exchange.status)).inc()
        self.metrics.request_seconds.observe(time.monotonic() - exchange.started_s)

    # ------------------------------------------------------------ routes

    async def _route(self, exchange: Exchange) -> None:
        path = exchange.path
        if path == "/v1" or path.startswith("/v1/"):
            self._key_check.check(exchange.headers)
        methods = self._routes.get(path)
        if methods is None and path.startswith("/v1/models/") and path != "/v1/models/":
            methods = {"GET": self._model}
        if methods is None:
            raise self._no_path(path)
        handler = methods.get("GET" if exchange.method == "HEAD" else exchange.method)
        if handler is None:
            allowed = ", ".join(methods).replace("GET", "GET, HEAD")
            message = f"{path[:200]} takes {allowed}, not {exchange.method}."
            raise ApiError(405, message, code="method_not_allowed", headers=((b"allow", allowed.encode()),))
        await handler(exchange)

    def _no_path(self, path: str) -> ApiError:
        """The 404 of a path that is not served, which names the one that was probably meant."""
        plain = re.sub("/+", "/", path.lower()[:_MAX_MISTAKEN_PATH]).rstrip("/")
        meant = [known for known in self._routes if plain.endswith(known) or known == f"/v1{plain}"]
        advice = f" Did you mean {max(meant, key=len)}?" if meant else ""
        return ApiError(404, f"There is no {path[:200]}.{advice}", code="not_found")

    async def _ping(self, exchange: Exchange) -> None:
        await exchange.answer(200, b'{"message":"pong"}')

    async def _livez(self, exchange: Exchange) -> None:
        await exchange.answer(200, b'{"alive":true}')

    async def _readyz(self, exchange: Exchange) -> None:
        await exchange.answer(200 if self._health.is_ready else 503, self._health.report())

    async def _metrics(self, exchange: Exchange) -> None:
        await exchange.answer(200, self.metrics.render(), CONTENT_TYPE)

    async def _models(self, exchange: Exchange) -> None:
        cards = [self._card(name) for name in self._names]
        await exchange.answer(200, msgspec.json.encode({"object": "list", "data": cards}))

    async def _model(self, exchange: Exchange) -> None:
        name = exchange.path.removeprefix("/v1/models/")
        if name not in self._names:
            raise no_model(name, self._names)
        await exchange.answer(200, msgspec.json.encode(self._card(name)))

    def _card(self, name: str) -> dict[str, Any]:
        card: dict[str, Any] = {"id": name, "object": "model", "created": self._created_s, "owned_by": "toka"}
        if self.engine is not None:
            card["default_sampling_params"] = describe_defaults(self.engine.limits.defaults)
            card["max_model_len"] = self.engine.limits.max_request_tokens
        return card

    async def _completions(self, exchange: Exchange) -> None:
        engine = self._serving_engine()
        request = self._completion_decoder.decode(await exchange.read_json(self._budget))
        asked = engine.limits.check_completion(request)
        encoder = PromptEncoder(engine.tokenizer, engine.limits, exchange.connection)
        prompts, texts = await encoder.encode_prompt(request.prompt, with_text=bool(request.echo))
        spec = engine.limits.plan(asked, prompts, "prompt", DEFAULT_COMPLETION_TOKENS)
        form = _make_format(CompletionFormat, request.model, engine, asked)
        job = Job(
            prompts,
            spec,
            form,
            _renderer_factory(engine, asked),
            asked.is_streamed,
            asked.includes_usage,
            texts,
        )
        await run_job(job, exchange, self._streams, self.metrics)

    async def _chat(self, exchange: Exchange) -> None:
        engine = self._serving_engine()
        request = self._chat_decoder.decode(await exchange.read_json(self._budget))
        asked = engine.limits.check_chat(request)
        if engine.template is None:
            raise invalid("messages", "This model has no chat template: use /v1/completions.")
        encoder = PromptEncoder(engine.tokenizer, engine.limits, exchange.connection)
        prompts = [await encoder.encode_chat(request.messages, engine.template)]
        spec = engine.limits.plan(asked, prompts, "messages")
        form = _make_format(ChatFormat, request.model, engine, asked)
        job = Job(prompts, spec, form, _renderer_factory(engine, asked), asked.is_streamed, asked.includes_usage)
        await run_job(job, exchange, self._streams, self.metrics)

    def _serving_engine(self) -> Engine:
        self._health.check_serving()
        if self.engine is None:
            raise AssertionError("serving without EngineInfo")
        return self.engine


def _log_defect(exchange: Exchange, error: Exception) -> None:
    """Log where `error` comes from, without its message: that may quote the request."""
    frames = "".join(traceback.format_tb(error.__traceback__, -_LOGGED_FRAMES))
    logger.error("request failed path=%r error=%s\n%s", exchange.path[:200], type(error).__name__, frames.rstrip())


def _make_format(
    kind: type[CompletionFormat] | type[ChatFormat], model: str, engine: Engine, asked: Asked
) -> CompletionFormat | ChatFormat:
    return kind(
        model,
        engine.tokenizer.label_of,
        has_logprobs=asked.sampling.num_logprobs >= 0,
        num_top=asked.sampling.num_logprobs,
        includes_usage=asked.includes_usage,
        names_token_ids=asked.names_token_ids,
    )


def _renderer_factory(engine: Engine, asked: Asked) -> Callable[[], Renderer]:
    bytes_of = engine.tokenizer.bytes_of
    keeps_tokens = asked.sampling.num_logprobs >= 0
    if asked.stops is None and not keeps_tokens:
        return lambda: Renderer(bytes_of)
    return lambda: TrackingRenderer(bytes_of, asked.stops, keeps_tokens=keeps_tokens)
