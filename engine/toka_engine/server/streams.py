"""The running streams: one `Generation` per HTTP request, one `Choice` per output sequence.

Owns: the numbers of streams, the link to the manager, and the registry stream -> choice. A generation is
entered with `with`: its `__exit__` is the one place that removes its streams and cancels those that still
run. Choices only collect token ids here; text is made in `render`, by the request's own task.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TypeAlias

import msgspec
import numpy as np

from toka_engine.messages import FINISH_ERROR, Cancel, Deltas, Int32s, Refused, Sampling, Submit
from toka_engine.server.errors import ApiError, ClientGoneError

TopTokens: TypeAlias = list[tuple[int, float]]
"""The most likely tokens at one place, with their logprobs."""


class GenerationSpec(msgspec.Struct, frozen=True):
    """What is asked of the manager, the same for every prompt of a request."""

    num_choices: int
    """Per prompt."""
    max_tokens: int
    sampling: Sampling
    stop_ids: tuple[int, ...]
    deliver_each: bool


class Choice:
    """What has arrived for one output sequence and was not yet taken by its renderer."""

    __slots__ = (
        "finish_reason",
        "generation",
        "index",
        "is_closed",
        "logprobs",
        "num_tokens",
        "stream",
        "tokens",
        "tops",
        "whole_tokens",
    )

    def __init__(self, generation: Generation, index: int, stream: int) -> None:
        self.generation = generation
        self.index = index
        self.stream = stream
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.tops: dict[int, TopTokens] = {}
        """By index into `tokens`."""
        self.whole_tokens: Int32s | None = None
        """The whole output, where it is delivered at the end and without logprobs."""
        self.finish_reason: int | None = None
        self.num_tokens = 0
        """Completion tokens of the whole stream; valid once it has ended."""
        self.is_closed = False
        """Ended or cancelled: what still comes for it is dropped."""


class Generation:
    """One request's prompts and choices, from submission to the last token."""

    def __init__(self, streams: Streams, prompts: Sequence[Int32s], spec: GenerationSpec) -> None:
        self.prompts = prompts
        self.spec = spec
        self.has_logprobs = spec.sampling.num_logprobs >= 0
        self.choices: list[Choice] = []
        self.dirty: list[Choice] = []
        self._streams = streams
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __enter__(self) -> Generation:
        self._streams.begin(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._streams.end(self)

    async def news(self) -> list[Choice]:
        """Wait for something new; return the choices that have it, each once. Raises what `fail` got."""
        while not self.dirty:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._error is not None:
            raise self._error
        dirty, self.dirty = self.dirty, []
        return dirty

    def cut(self, choice: Choice) -> None:
        """Stop the stream of `choice` here: its stop string has been seen."""
        if not choice.is_closed:
            choice.is_closed = True
            self._streams.cancel([choice.stream])

    def fail(self, error: Exception) -> None:
        """Make `news` raise `error`; the first one counts."""
        if self._error is None:
            self._error = error
            self.wake()

    def abandon(self) -> None:
        """The client is gone."""
        self.fail(ClientGoneError("the client closed the connection"))

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Streams:
    """All generations of this process."""

    def __init__(self, send: Callable[[msgspec.Struct], None]) -> None:
        """`send` takes a message to the manager; it does not raise when the manager is gone."""
        self._send = send
        self._next_stream = 0
        self._choices: dict[int, Choice] = {}
        self._generations: set[Generation] = set()
        self._error: ApiError | None = None

    @property
    def num_generations(self) -> int:
        return len(self._generations)

    @property
    def num_streams(self) -> int:
        return len(self._choices)

    def begin(self, generation: Generation) -> None:
        """Number the streams of `generation` and submit its prompts. Raises what `fail_all` got."""
        if self._error is not None:
            raise self._error
        spec = generation.spec
        self._generations.add(generation)
        for prompt_ids in generation.prompts:
            first = self._next_stream
            self._next_stream += spec.num_choices
            for stream in range(first, self._next_stream):
                choice = Choice(generation, len(generation.choices), stream)
                generation.choices.append(choice)
                self._choices[stream] = choice
            self._send(
                Submit(
                    first,
                    spec.num_choices,
                    prompt_ids,
                    spec.max_tokens,
                    spec.sampling,
                    spec.stop_ids,
                    spec.deliver_each,
                )
            )

    def end(self, generation: Generation) -> None:
        """Remove every trace of `generation`; cancel what still runs."""
        self._generations.discard(generation)
        for choice in generation.choices:
            self._choices.pop(choice.stream, None)
        if running := [choice.stream for choice in generation.choices if not choice.is_closed]:
            self.cancel(running)

    def cancel(self, streams: list[int]) -> None:
        self._send(Cancel(np.array(streams, np.int64)))

    def fail_all(self, error: ApiError) -> None:
        """End every generation with `error`, also those that begin later: a request whose body was still read, or
        whose prompt was still encoded, would wait for tokens that nobody makes any more.
        """
        self._error = error
        for generation in list(self._generations):
            generation.fail(error)

    def on_refused(self, message: Refused) -> None:
        if choice := self._choices.get(message.first_stream):
            # Its streams are unknown to the manager now; the cancellation at the end ignores them.
            choice.generation.fail(ApiError(429, message.message, code="queue_full", headers=((b"retry-after", b"1"),)))

    def on_deltas(self, deltas: Deltas) -> None:
        """Hand out one message of the manager and wake the tasks concerned."""
        touched: list[Generation] = []
        if deltas.streams.size:
            if deltas.logprobs.size:
                self._hand_out_with_logprobs(deltas, touched)
            else:
                self._hand_out(deltas, touched)
        if deltas.ended.size:
            self._hand_out_ends(deltas, touched)
        for generation in touched:
            generation.wake()

    def _hand_out(self, deltas: Deltas, touched: list[Generation]) -> None:
        # A step brings one token per stream, so that grouping by stream first would only add to this loop.
        choices = self._choices
        for stream, token in zip(deltas.streams.tolist(), deltas.tokens.tolist(), strict=True):
            choice = choices.get(stream)
            if choice is None or choice.is_closed:
                continue
            if not choice.tokens:
                _mark_dirty(choice, touched)
            choice.tokens.append(token)

    def _hand_out_with_logprobs(self, deltas: Deltas, touched: list[Generation]) -> None:
        tops = {} if deltas.top_of_ended else _top_tokens(deltas)
        entries = zip(deltas.streams.tolist(), deltas.tokens.tolist(), deltas.logprobs.tolist(), strict=True)
        for row, (stream, token, logprob) in enumerate(entries):
            choice = self._choices.get(stream)
            if choice is None or choice.is_closed:
                continue
            if not choice.tokens:
                _mark_dirty(choice, touched)
            if row in tops:
                choice.tops[len(choice.tokens)] = tops[row]
            choice.tokens.append(token)
            if choice.generation.has_logprobs:
                choice.logprobs.append(logprob)

    def _hand_out_ends(self, deltas: Deltas, touched: list[Generation]) -> None:
        tops = _top_tokens(deltas) if deltas.top_of_ended else {}
        bounds = np.concatenate(([0], np.cumsum(deltas.ended_lengths, dtype=np.int64))).tolist()
        ends = zip(
            deltas.ended.tolist(),
            deltas.ended_reasons.tolist(),
            deltas.ended_num_tokens.tolist(),
            strict=True,
        )
        for row, (stream, reason, num_tokens) in enumerate(ends):
            choice = self._choices.get(stream)
            if choice is None or choice.is_closed:
                continue
            if not choice.tokens:
                _mark_dirty(choice, touched)
            begin, end = bounds[row], bounds[row + 1]
            if end > begin and choice.generation.has_logprobs:
                choice.tokens = deltas.ended_tokens[begin:end].tolist()
                choice.logprobs = deltas.ended_logprobs[begin:end].tolist()
                choice.tops = {place - begin: tops[place] for place in range(begin, end) if place in tops}
            elif end > begin:
                choice.whole_tokens = deltas.ended_tokens[begin:end]
            choice.finish_reason = reason
            choice.num_tokens = num_tokens
            choice.is_closed = True
            if reason == FINISH_ERROR:
                choice.generation.fail(_not_finite())


def _mark_dirty(choice: Choice, touched: list[Generation]) -> None:
    """Called where `choice` has nothing pending: so it stands in `dirty` once."""
    generation = choice.generation
    if not generation.dirty:
        touched.append(generation)
    generation.dirty.append(choice)


def _top_tokens(deltas: Deltas) -> dict[int, TopTokens]:
    """By row; -1 marks where fewer were asked for."""
    width = deltas.top_width
    tokens = deltas.top_tokens.reshape(-1, width).tolist() if width else []
    logprobs = deltas.top_logprobs.reshape(-1, width).tolist() if width else []
    return {
        row: [(token, logprob) for token, logprob in zip(*pair, strict=True) if token >= 0]
        for row, *pair in zip(deltas.top_rows.tolist(), tokens, logprobs, strict=True)
    }


def _not_finite() -> ApiError:
    return ApiError(500, "The model produced non-finite values (NaN or infinity) for this request.", code="not_finite")
