"""The running streams: one `Generation` per HTTP request, one `Choice` per output sequence.

Owns: the numbers of streams, what is sent to which replica, and the registry stream -> choice. A generation is
entered with `with`: its `__exit__` is the one place that removes its streams and cancels those that still
run. Choices only collect token ids here; text is made in `render`, by the request's own task.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import TypeAlias

import numpy as np

from toka_engine.messages import (
    DEADLINE_UNREACHABLE,
    Cancel,
    Deltas,
    Int32s,
    PromptLogprobs,
    Refused,
    Started,
    Submit,
)
from toka_engine.server.errors import ApiError, ClientGoneError
from toka_engine.server.generation_failures import FAILURES
from toka_engine.server.generation_spec import GenerationSpec
from toka_engine.server.generation_times import GenerationTimes
from toka_engine.server.prefix_index import PrefixHasher
from toka_engine.server.replicas import Replica, Replicas, Submission

_INLINE_TOKENS = 8192
"""Fewer take less time to hash than a thread takes to answer."""

TopTokens: TypeAlias = list[tuple[int, float]]
"""The most likely tokens at one position, with their logprobs."""


class Choice:
    """One output sequence: the tokens that have arrived and its renderer has not taken yet."""

    __slots__ = (
        "finish_reason",
        "generation",
        "index",
        "is_closed",
        "logprobs",
        "num_taken",
        "num_tokens",
        "stream",
        "submission",
        "tokens",
        "tops",
        "whole_tokens",
    )

    def __init__(self, generation: Generation, index: int, submission: Submission, stream: int) -> None:
        self.generation = generation
        self.index = index
        self.submission = submission
        self.stream = stream
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.tops: dict[int, TopTokens] = {}
        """The top tokens, by index into `tokens`."""
        self.num_taken = 0
        """Tokens that the renderer has taken out of `tokens`."""
        self.whole_tokens: Int32s | None = None
        """The whole output, where it is delivered at the end and without logprobs."""
        self.finish_reason: int | None = None
        self.num_tokens = 0
        """Completion tokens of the whole stream; valid once it has ended."""
        self.is_closed = False
        """Ended or cancelled: what still comes for it is dropped."""


class Generation:
    """One request's prompts and choices, from submission to the last token."""

    def __init__(
        self,
        streams: Streams,
        prompts: Sequence[Int32s],
        spec: GenerationSpec,
        blocks: Sequence[Sequence[bytes]] = (),
    ) -> None:
        """`blocks`: for each prompt, its hashes by PrefixHasher; none where there is one replica."""
        self.prompts = prompts
        self.blocks = blocks
        self.spec = spec
        self.has_logprobs = spec.sampling.num_logprobs >= 0
        self.choices: list[Choice] = []
        self.submissions: list[Submission] = []
        self.prompt_logprobs: list[list[PromptLogprobs]] = [[] for _ in prompts]
        """The messages that have come of each prompt, all of them by the first token of a choice."""
        self.dirty: list[Choice] = []
        self.times = GenerationTimes()
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

    @property
    def num_cached(self) -> int:
        """Prompt tokens found in the prefix cache; a prompt whose choices were sent in parts counts once."""
        first, *others = self.submissions
        return first.num_cached + sum(each.num_cached for each in others if not each.submit.first_choice)

    async def news(self) -> list[Choice]:
        """Wait for something new; return the choices that have it, each once. Raises what `fail` got, behind what came
        before it, unless there is nobody to read that.
        """
        while not self.dirty:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._error is not None and isinstance(self._error, ClientGoneError):
            raise self._error
        dirty, self.dirty = self.dirty, []
        return dirty

    def cut(self, choice: Choice) -> None:
        """Stop the stream of `choice` here: its stop string has been seen."""
        if not choice.is_closed:
            self._streams.cut(choice)

    def fail(self, error: Exception) -> None:
        """Make `news` raise `error`; the first one counts."""
        if self._error is None:
            self._error = error
            self.wake()

    def abandon(self) -> None:
        """End the generation, because its client is gone."""
        self.fail(ClientGoneError("the client closed the connection"))

    def expire(self, error: Exception) -> None:
        """End the generation with `error` and stop its streams now, even if its client does not read."""
        if any(not choice.is_closed for choice in self.choices):
            self._streams.cancel(self)
            self.fail(error)

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Streams:
    """All generations of this process."""

    def __init__(self, replicas: Replicas, hasher: PrefixHasher | None = None) -> None:
        """`hasher`: None where prompts need no hashes, because there is no choice of replica, or no prefix cache."""
        self.replicas = replicas
        self._hasher = hasher
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

    async def hash_prompts(self, prompts: Sequence[Int32s]) -> list[list[bytes]]:
        """Return the hashes of each prompt's blocks; nothing where they are not needed."""
        if self._hasher is None:
            return []
        work = partial(_hash_all, self._hasher, prompts)
        if sum(prompt.size for prompt in prompts) <= _INLINE_TOKENS:
            return work()
        return await asyncio.to_thread(work)

    def begin(self, generation: Generation) -> None:
        """Number the streams of `generation` and submit its prompts. Raises what `fail_all` got."""
        if self._error is not None:
            raise self._error
        spec = generation.spec
        self._generations.add(generation)
        for number, prompt_ids in enumerate(generation.prompts):
            first = self._next_stream
            self._next_stream += spec.num_choices
            submit = Submit(
                first,
                spec.num_choices,
                prompt_ids,
                spec.max_tokens,
                spec.sampling,
                spec.stop_ids,
                spec.deliver_each,
                is_streamed=spec.is_streamed,
                edits=spec.edits,
                delivers_stop=spec.delivers_stop,
                prompt_logprobs=spec.prompt_logprobs,
                grammar=spec.grammar,
                priority=spec.priority,
                timeout_s=spec.timeout_s,
            )
            for submission in self.replicas.place(submit, generation.blocks[number] if generation.blocks else ()):
                self._submit(generation, submission)

    def _submit(self, generation: Generation, submission: Submission) -> None:
        submit = submission.submit
        generation.submissions.append(submission)
        for stream in range(submit.first_stream, submit.first_stream + submit.num_choices):
            choice = Choice(generation, len(generation.choices), submission, stream)
            generation.choices.append(choice)
            self._choices[stream] = choice
        submission.replica.send(submit)

    def end(self, generation: Generation) -> None:
        """Remove every trace of `generation`; cancel what still runs."""
        self._generations.discard(generation)
        for choice in generation.choices:
            self._choices.pop(choice.stream, None)
        self.cancel(generation)

    def cancel(self, generation: Generation) -> None:
        """Stop the streams of `generation` that still run."""
        running: dict[Replica, list[int]] = {}
        for choice in generation.choices:
            if not choice.is_closed:
                running.setdefault(choice.submission.replica, []).append(choice.stream)
                self._close(choice)
        for replica, streams in running.items():
            replica.send(Cancel(np.array(streams, np.int64)))

    def cut(self, choice: Choice) -> None:
        """Stop the stream of `choice`, which has all that it wants."""
        self._close(choice)
        self.replicas.learn_end(choice.num_taken, choice.generation.spec.max_tokens)
        choice.submission.replica.send(Cancel(np.array([choice.stream], np.int64)))

    def _close(self, choice: Choice) -> None:
        """Drop whatever still comes for `choice`; its replica owes nothing more for it."""
        choice.is_closed = True
        self.replicas.close_choice(choice.submission, choice.num_taken + len(choice.tokens))

    def fail_all(self, error: ApiError) -> None:
        """End every generation with `error`, also those that begin later: a request whose body was still read, or
        whose prompt was still encoded, would wait for tokens that nobody makes any more.
        """
        self._error = error
        for generation in list(self._generations):
            generation.fail(error)

    def fail_replica(self, replica: Replica, error: ApiError) -> None:
        """End with `error` every generation that waits for tokens of `replica`, which is gone."""
        for generation in list(self._generations):
            if any(choice.submission.replica is replica and not choice.is_closed for choice in generation.choices):
                generation.fail(error)

    def on_refused(self, message: Refused) -> None:
        """Try another replica; else answer 429."""
        choice = self._choices.get(message.first_stream)
        if choice is not None and not choice.is_closed:
            if self.replicas.move(choice.submission):
                choice.submission.replica.send(choice.submission.submit)
                return
            # Its streams are unknown to the manager now; the cancellation at the end ignores them.
            retry_after = ((b"retry-after", b"%d" % message.retry_after_s),)
            param = "timeout_s" if message.code == DEADLINE_UNREACHABLE else None
            choice.generation.fail(ApiError(429, message.message, param=param, code=message.code, headers=retry_after))

    def on_started(self, message: Started) -> None:
        for stream, num_cached in zip(message.streams.tolist(), message.num_cached.tolist(), strict=True):
            if choice := self._choices.get(stream):
                self.replicas.start(choice.submission, num_cached)
                times = choice.generation.times
                if times.admitted_s is None:
                    times.admitted_s = time.monotonic()

    def on_prompt_logprobs(self, message: PromptLogprobs) -> None:
        """Keep them for the request's answer."""
        if choice := self._choices.get(message.first_stream):
            generation = choice.generation
            generation.prompt_logprobs[choice.index // generation.spec.num_choices].append(message)

    def on_deltas(self, replica: Replica, deltas: Deltas) -> None:
        """Hand out one message of a manager and wake the tasks concerned."""
        touched: list[Generation] = []
        if deltas.streams.size:
            if deltas.logprobs.size:
                num_dropped = self._hand_out_with_logprobs(deltas, touched)
            else:
                num_dropped = self._hand_out(deltas, touched)
            replica.outstanding -= deltas.streams.size - num_dropped
        if deltas.ended.size:
            self._hand_out_ends(deltas, touched)
        for generation in touched:
            generation.wake()

    def _hand_out(self, deltas: Deltas, touched: list[Generation]) -> int:
        """Return how many tokens nobody waits for any more."""
        # A step brings one token per stream, so that grouping by stream first would only add to this loop.
        choices = self._choices
        num_dropped = 0
        for stream, token in zip(deltas.streams.tolist(), deltas.tokens.tolist(), strict=True):
            choice = choices.get(stream)
            if choice is None or choice.is_closed:
                num_dropped += 1
                continue
            if not choice.tokens:
                _mark_dirty(choice, touched)
            choice.tokens.append(token)
        return num_dropped

    def _hand_out_with_logprobs(self, deltas: Deltas, touched: list[Generation]) -> int:
        """Hand out as `_hand_out` does, with logprobs."""
        tops = {} if deltas.top_of_ended else _top_tokens(deltas)
        entries = zip(deltas.streams.tolist(), deltas.tokens.tolist(), deltas.logprobs.tolist(), strict=True)
        num_dropped = 0
        for row, (stream, token, logprob) in enumerate(entries):
            choice = self._choices.get(stream)
            if choice is None or choice.is_closed:
                num_dropped += 1
                continue
            if not choice.tokens:
                _mark_dirty(choice, touched)
            if row in tops:
                choice.tops[len(choice.tokens)] = tops[row]
            choice.tokens.append(token)
            if choice.generation.has_logprobs:
                choice.logprobs.append(logprob)
        return num_dropped

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
            self.replicas.learn_end(num_tokens, choice.generation.spec.max_tokens)
            if reason in FAILURES:
                self._close(choice)
                choice.generation.fail(FAILURES[reason]())
                continue
            if not choice.tokens:
                _mark_dirty(choice, touched)
            self._close(choice)
            begin, end = bounds[row], bounds[row + 1]
            if end > begin and choice.generation.has_logprobs:
                choice.tokens = deltas.ended_tokens[begin:end].tolist()
                choice.logprobs = deltas.ended_logprobs[begin:end].tolist()
                choice.tops = {place - begin: tops[place] for place in range(begin, end) if place in tops}
            elif end > begin:
                choice.whole_tokens = deltas.ended_tokens[begin:end]
            choice.finish_reason = reason
            choice.num_tokens = num_tokens


def _hash_all(hasher: PrefixHasher, prompts: Sequence[Int32s]) -> list[list[bytes]]:
    return [hasher.hash_blocks(prompt) for prompt in prompts]


def _mark_dirty(choice: Choice, touched: list[Generation]) -> None:
    """Note that `choice`, which had nothing pending, has new tokens; so it stands in `dirty` once."""
    generation = choice.generation
    if not generation.dirty:
        touched.append(generation)
    generation.dirty.append(choice)


def _top_tokens(deltas: Deltas) -> dict[int, TopTokens]:
    """Return the top tokens by row; -1 marks where fewer were asked for."""
    width = deltas.top_width
    tokens = deltas.top_tokens.reshape(-1, width).tolist() if width else []
    logprobs = deltas.top_logprobs.reshape(-1, width).tolist() if width else []
    return {
        row: [(token, logprob) for token, logprob in zip(*pair, strict=True) if token >= 0]
        for row, *pair in zip(deltas.top_rows.tolist(), tokens, logprobs, strict=True)
    }
