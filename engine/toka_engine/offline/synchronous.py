"""`LLM`: `AsyncLLM` for scripts without asyncio. Its event loop runs in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from toka_engine.errors import EngineDiedError
from toka_engine.offline.asynchronous import AsyncLLM
from toka_engine.offline.outputs import Messages, Output, Piece, Prompt, SamplingOptions

T = TypeVar("T")


class LLM:
    """An engine inside this script: `with LLM(model) as llm: outputs = llm.generate(prompts, n=8)`.

    Without `with` it ends by `close`, or with the script. `settings` are the keys of `toka --help` (`device="cpu"`,
    `kv_cache_num_tokens=65536`, `seed=0`). Starting returns when the model is ready, and raises any error of
    `toka_engine.errors`; the methods raise RequestError, which names the option that is wrong, and EngineDiedError.
    Any threads may call them.
    """

    def __init__(self, model: str = "builtin://smollm2", **settings: Any) -> None:
        self._llm = AsyncLLM(model, **settings)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="toka-llm", daemon=True)
        self._thread.start()
        try:
            self._run(self._llm.start())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the engine and what still runs. May be called again."""
        if self._loop.is_closed():
            return
        self._run(self._llm.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def generate(
        self, prompts: str | Sequence[int] | Sequence[Prompt], **options: Unpack[SamplingOptions]
    ) -> list[Output]:
        """Return one output per prompt, in order. A prompt is a text or token ids; one alone is a list of one."""
        return self._run(self._llm.generate(prompts, **options))

    def chat(self, conversations: Messages | Sequence[Messages], **options: Unpack[SamplingOptions]) -> list[Output]:
        """Return one output per conversation, in order; a conversation is a list of messages."""
        return self._run(self._llm.chat(conversations, **options))

    def stream(self, prompt: Prompt, **options: Unpack[SamplingOptions]) -> Iterator[Piece]:
        """Yield the text of one prompt's choices as it comes."""
        return self._iterate(self._llm.stream(prompt, **options))

    def stream_chat(self, messages: Messages, **options: Unpack[SamplingOptions]) -> Iterator[Piece]:
        """Yield the answers to one conversation as they come."""
        return self._iterate(self._llm.stream_chat(messages, **options))

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if self._loop.is_closed():
            coroutine.close()
            raise EngineDiedError("the engine has been closed")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C too: nobody waits for these samples any more
            future.cancel()
            raise

    def _iterate(self, pieces: AsyncIterator[Piece]) -> Iterator[Piece]:
        async def take() -> Piece | None:
            return await anext(pieces, None)

        try:
            while (piece := self._run(take())) is not None:
                yield piece
        finally:
            if not self._loop.is_closed():
                self._run(pieces.aclose())  # type: ignore[attr-defined]
