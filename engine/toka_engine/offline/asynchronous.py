"""`AsyncLLM`: prompts to samples by asyncio. Owns the requests to the engine, how many at once, and their errors."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, Unpack, cast

import httpx

from toka_engine.errors import EngineDiedError, RequestError, TokaError
from toka_engine.offline.outputs import (
    Choice,
    Messages,
    Output,
    Piece,
    Prompt,
    SamplingOptions,
    chat_body,
    completion_body,
    read_chat_logprobs,
    read_completion_logprobs,
)
from toka_engine.offline.process import ScriptEngine

_MAX_REQUESTS = 256
"""Requests at once."""
_MAX_SAMPLES = 32 * 1024
"""Samples asked for at once: they fill every slot of an engine and stay below its queue's limit."""
_MAX_BUNDLE, _MAX_BUNDLE_SAMPLES, _MAX_BUNDLE_SIZE = 64, 256, 1 << 20
"""Prompts, samples, and characters or tokens of one request with several prompts."""
_MAX_BODY_BYTES = 1 << 28


class AsyncLLM:
    """An engine inside this script. Use: `async with AsyncLLM(model) as llm: await llm.generate(prompts)`.

    `settings` are the keys of `toka --help` (`device="cpu"`, `kv_cache_num_tokens=65536`, `seed=0`). Starting
    raises any error of `toka_engine.errors`; the methods raise RequestError, which names the option that is wrong, and
    EngineDiedError.
    """

    def __init__(self, model: str = "builtin://smollm2", **settings: Any) -> None:
        self._engine = ScriptEngine({"model": model, "max_body_bytes": _MAX_BODY_BYTES, **settings})
        self._client: httpx.AsyncClient | None = None
        self._name = ""

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Wait until the engine is ready; done by `async with`."""
        await asyncio.to_thread(self._engine.wait_ready)
        self._client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(
                uds=self._engine.socket_path, limits=httpx.Limits(max_connections=None, max_keepalive_connections=16)
            ),
            base_url="http://toka/v1",
            timeout=None,
            trust_env=False,
        )
        self._name = (await self._request("GET", "/models"))["data"][0]["id"]

    async def close(self) -> None:
        """End the engine; done by `async with`. May be called again."""
        if self._client is not None:
            await self._client.aclose()
        await asyncio.to_thread(self._engine.close)

    async def generate(
        self, prompts: str | Sequence[int] | Sequence[Prompt], **options: Unpack[SamplingOptions]
    ) -> list[Output]:
        """Return one output per prompt, in order. A prompt is a text or token ids; one alone is a list of one."""
        listed = _list_prompts(prompts)
        bundles = list(_bundle(listed, options.get("n") or 1))
        results = await self._gather([(self._complete, bundle, options) for bundle in bundles], options)
        return [output for outputs in results for output in outputs]

    async def chat(
        self, conversations: Messages | Sequence[Messages], **options: Unpack[SamplingOptions]
    ) -> list[Output]:
        """Return one output per conversation, in order; a conversation is a list of messages."""
        is_one = bool(conversations) and isinstance(conversations[0], dict)
        listed = cast("Sequence[Messages]", [conversations] if is_one else conversations)
        return await self._gather([(self._answer, messages, options) for messages in listed], options)

    async def stream(self, prompt: Prompt, **options: Unpack[SamplingOptions]) -> AsyncIterator[Piece]:
        """Yield the text of one prompt's choices as it comes."""
        body = completion_body(options) | {"prompt": _to_json(prompt)}
        async for choice in self._events("/completions", body):
            logprobs = read_completion_logprobs(choice["logprobs"])
            yield Piece(choice["index"], choice["text"], choice["finish_reason"], logprobs)

    async def stream_chat(self, messages: Messages, **options: Unpack[SamplingOptions]) -> AsyncIterator[Piece]:
        """Yield the answers to one conversation as they come."""
        body = chat_body(options) | {"messages": list(messages)}
        async for choice in self._events("/chat/completions", body):
            text, logprobs = choice["delta"].get("content") or "", read_chat_logprobs(choice["logprobs"])
            if text or logprobs or choice["finish_reason"]:
                yield Piece(choice["index"], text, choice["finish_reason"], logprobs)

    # ------------------------------------------------------------ requests

    async def _gather(self, calls: Sequence[tuple[Any, Any, SamplingOptions]], options: SamplingOptions) -> list[Any]:
        """Return the results of calls in order; the first error ends the others."""
        num_samples = max(1, int(options.get("n") or 1))
        room = asyncio.Semaphore(max(1, min(_MAX_REQUESTS, _MAX_SAMPLES // num_samples)))

        async def run(method: Any, argument: Any, options: SamplingOptions) -> Any:
            async with room:
                return await method(argument, options)

        tasks = [asyncio.create_task(run(*call)) for call in calls]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _complete(self, prompts: Sequence[Prompt], options: SamplingOptions) -> list[Output]:
        asked = [_to_json(prompt) for prompt in prompts]
        body = completion_body(options) | {"prompt": asked[0] if len(asked) == 1 else asked}
        answer = await self._request("POST", "/completions", body)
        choices = [
            Choice(index, one["text"], one["finish_reason"], read_completion_logprobs(one["logprobs"]))
            for index, one in enumerate(answer["choices"])
        ]
        num_choices = len(choices) // len(prompts)
        return [
            Output(
                prompt,
                [
                    Choice(index, choice.text, choice.finish_reason, choice.logprobs)
                    for index, choice in enumerate(choices[place * num_choices : (place + 1) * num_choices])
                ],
            )
            for place, prompt in enumerate(prompts)
        ]

    async def _answer(self, messages: Messages, options: SamplingOptions) -> Output:
        body = chat_body(options) | {"messages": list(messages)}
        answer = await self._request("POST", "/chat/completions", body)
        choices = [
            Choice(one["index"], one["message"]["content"], one["finish_reason"], read_chat_logprobs(one["logprobs"]))
            for one in answer["choices"]
        ]
        return Output(messages, choices)

    async def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        async with self._translated_errors():
            response = await self._connected.request(method, path, json=self._named(body))
            if response.status_code != httpx.codes.OK:
                raise _to_request_error(response.status_code, response.content)
            return json.loads(response.content)

    async def _events(self, path: str, body: dict[str, Any]) -> AsyncIterator[Any]:
        """Yield every choice of every event. An answer that breaks off is an error."""
        request = self._named(body | {"stream": True})
        async with self._translated_errors(), self._connected.stream("POST", path, json=request) as response:
            if response.status_code != httpx.codes.OK:
                raise _to_request_error(response.status_code, await response.aread())
            async for line in response.aiter_lines():
                event = line.removeprefix("data: ")
                if event == "[DONE]":
                    return
                if event:
                    decoded = json.loads(event)
                    if "error" in decoded:
                        raise _to_request_error(httpx.codes.SERVICE_UNAVAILABLE, event.encode())
                    for choice in decoded["choices"]:
                        yield choice
        raise await self._why_it_ended("the engine broke off an answer")

    @property
    def _connected(self) -> httpx.AsyncClient:
        if self._client is None or self._client.is_closed:
            raise EngineDiedError("the engine has not been started, or has been closed")
        return self._client

    def _named(self, body: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if body is None else {"model": self._name, **body}

    @contextlib.asynccontextmanager
    async def _translated_errors(self) -> AsyncIterator[None]:
        """Turn a broken connection, or the answer of an engine that is ending, into why the engine ended."""
        try:
            yield
        except httpx.TransportError as error:
            raise await self._why_it_ended(str(error) or type(error).__name__) from error
        except RequestError as error:
            if error.status != httpx.codes.SERVICE_UNAVAILABLE:
                raise
            raise await self._why_it_ended(str(error)) from error

    async def _why_it_ended(self, otherwise: str) -> TokaError:
        error = await asyncio.to_thread(self._engine.wait_end)
        return error or EngineDiedError(otherwise)


def _list_prompts(prompts: Any) -> list[Prompt]:
    is_one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    return [prompts] if is_one else list(prompts)


def _bundle(prompts: Sequence[Prompt], num_samples: int) -> Iterator[list[Prompt]]:
    """Yield the prompts in requests: several in one where there are too many to send each alone."""
    most = min(-(-len(prompts) // _MAX_REQUESTS), _MAX_BUNDLE, max(1, _MAX_BUNDLE_SAMPLES // max(1, num_samples)))
    bundle: list[Prompt] = []
    size = 0
    for prompt in prompts:
        is_other_kind = bool(bundle) and isinstance(bundle[0], str) != isinstance(prompt, str)
        if bundle and (len(bundle) >= most or size + len(prompt) > _MAX_BUNDLE_SIZE or is_other_kind):
            yield bundle
            bundle, size = [], 0
        bundle.append(prompt)
        size += len(prompt)
    if bundle:
        yield bundle


def _to_json(prompt: Prompt) -> str | list[int]:
    return prompt if isinstance(prompt, str) else [int(token) for token in prompt]


def _to_request_error(status: int, content: bytes) -> RequestError:
    try:
        error = json.loads(content)["error"]
        return RequestError(error["message"], status, error.get("param"), error.get("code"))
    except (ValueError, KeyError, TypeError):
        return RequestError(f"the engine answered {status}", status, None, None)
