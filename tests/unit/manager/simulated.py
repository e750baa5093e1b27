"""A model worker that executes each Step literally, without a model, and a harness that drives the manager
with it.

Its "KV" of a token is a hash of that token and of the KV before it, read back through the pages; its next
token hashes every KV entry of the context, read through the block table. So any error of paging, sharing,
copying, preemption or scheduling changes the output, and a sequential reference (`reference`) says what it
should have been.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from msgspec.structs import replace as replace_fields
from toka_engine.config import EngineConfig
from toka_engine.manager.core import Manager
from toka_engine.manager.requests import choice_seed
from toka_engine.manager.sizes import Sizes
from toka_engine.messages import (
    FINISH_ERROR,
    FINISH_LENGTH,
    FINISH_STOP,
    Cancel,
    Deltas,
    LogitEdits,
    PromptLogprobs,
    Refused,
    Step,
    Submit,
    Tokens,
)
from toka_engine.slot_parameters import Sampling

MASK = (1 << 61) - 1
NO_FAILURE = 0
NO_PENALTIES = (0.0, 0.0, 1.0)


def mix(left: int, right: int) -> int:
    return ((left * 0x9E3779B97F4A7C15 + right + 1) * 0xBF58476D1CE4E5B9 >> 7) & MASK


@dataclass(frozen=True)
class HashModel:
    """The deterministic model; `failure_period` > 0 makes one context in that many fail (not finite
    logits)."""

    vocab_size: int = 40
    failure_period: int = NO_FAILURE

    def kv(self, previous: int, token: int) -> int:
        return mix(previous, token)

    def sample(
        self, context: list[int], seed: int, num_sampled: int, penalties: tuple[float, ...]
    ) -> tuple[int, float]:
        digest = 0 if penalties == NO_PENALTIES else hash(penalties) & MASK
        for entry in context:
            digest = mix(digest, entry)
        if self.failure_period and digest % self.failure_period == 0:
            return -1, float("nan")
        if seed >= 0:
            digest = mix(digest, mix(seed, num_sampled))
        return digest % self.vocab_size, -float(digest % 1000) / 100


@dataclass
class Expected:
    tokens: list[int]
    logprobs: list[float]
    reason: int
    num_tokens: int


def penalties_of(submit: Submit) -> tuple[float, ...]:
    """Penalties and, as one number more, the edits."""
    sampling = submit.sampling
    penalties = sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty
    return penalties if submit.edits is None else (*penalties, digest_of(submit.edits))


def digest_of(edits: LogitEdits) -> float:
    return float(edits.bias_ids.sum() + edits.min_tokens)


def reference(model: HashModel, submit: Submit, choice: int) -> Expected:
    """The tokens that one stream must give, computed alone and in order."""
    context: list[int] = []
    for token in submit.prompt_ids.tolist():
        context.append(model.kv(context[-1] if context else 0, token))
    seed = choice_seed(submit.sampling.seed, choice)
    tokens: list[int] = []
    logprobs: list[float] = []
    while True:
        token, logprob = model.sample(context, seed, len(tokens), penalties_of(submit))
        if token < 0:
            return Expected(tokens, logprobs, FINISH_ERROR, len(tokens))
        if token in submit.stop_ids:
            if submit.delivers_stop:
                tokens.append(token)
                logprobs.append(logprob)
                return Expected(tokens, logprobs, FINISH_STOP, len(tokens))
            return Expected(tokens, logprobs, FINISH_STOP, len(tokens) + 1)
        tokens.append(token)
        logprobs.append(logprob)
        if len(tokens) == submit.max_tokens:
            return Expected(tokens, logprobs, FINISH_LENGTH, len(tokens))
        context.append(model.kv(context[-1], token))


def score(previous: int, target: int, num_tops: int) -> tuple[float, int, list[int]]:
    """Logprob, rank and likeliest tokens of `target` after the token of this KV."""
    digest = mix(previous, target)
    return -float(digest % 1000) / 100, digest % 7 + 1, [digest % 40 + place for place in range(num_tops)]


def reference_scores(model: HashModel, submit: Submit) -> dict[int, tuple[float, int, list[int]]]:
    """By position in the prompt: what `PromptLogprobs` must say."""
    previous, expected = 0, {}
    for position, token in enumerate(submit.prompt_ids.tolist()):
        if position and submit.prompt_logprobs >= 0:
            expected[position] = score(previous, token, submit.prompt_logprobs)
        previous = model.kv(previous, token)
    return expected


class SimulatedWorker:
    """Holds pages, block table and slot state as a real worker does, and checks each step that it runs."""

    def __init__(self, sizes: Sizes, model: HashModel) -> None:
        self.sizes = sizes
        self.model = model
        self.pages = np.zeros((sizes.num_pages, sizes.page_size), np.int64)
        self.writers = np.full((sizes.num_pages, sizes.page_size, 2), -1, np.int64)  # (step, slot) of each entry
        self.table = np.full((sizes.num_slots, sizes.max_pages_per_seq), -1, np.int64)
        self.lengths = [0] * sizes.num_slots
        self.last_tokens = [0] * sizes.num_slots
        self.num_sampled = [0] * sizes.num_slots
        self.seeds = [-1] * sizes.num_slots
        self.num_logprobs = [-1] * sizes.num_slots
        self.penalties = [NO_PENALTIES] * sizes.num_slots
        self.sampled_in = [0] * sizes.num_slots  # the step that sampled the slot's last token
        self.next_number = 1
        self.num_shared_rows = 0

    def run(self, step: Step) -> Tokens:
        assert step.number == self.next_number
        self.next_number += 1
        self._set_up(step)
        self._check_groups(step)
        total = step.decode_slots.size + int(step.prefill_lengths.sum())
        assert 0 < total <= self.sizes.max_tokens_per_forward
        assert len(set(step.decode_slots.tolist()) | set(step.prefill_slots.tolist())) == (
            step.decode_slots.size + step.prefill_slots.size
        ), "a slot appears twice"
        newest = max((self.sampled_in[slot] for slot in step.decode_slots.tolist()), default=0)
        assert step.after == (newest if self.sizes.num_lanes > 1 else 0), "a first stage would wait for another token"
        rows = []
        writes = [(slot, [self.last_tokens[slot]]) for slot in step.decode_slots.tolist()]
        offset = 0
        for slot, start, length in zip(
            step.prefill_slots.tolist(),
            step.prefill_starts.tolist(),
            step.prefill_lengths.tolist(),
            strict=True,
        ):
            assert self.lengths[slot] == start, "a chunk does not begin where its slot's KV ends"
            writes.append((slot, step.prefill_tokens[offset : offset + length].tolist()))
            offset += length
        assert offset == step.prefill_tokens.size
        for slot, tokens in writes:
            self._write(step.number, slot, tokens)
        for slot in step.decode_slots.tolist():
            rows.append((slot, self._context(step.number, slot)))
        chunk_contexts = [self._context(step.number, slot) for slot in step.prefill_slots.tolist()]
        for slot, chunk in zip(step.fanout_slots.tolist(), step.fanout_chunks.tolist(), strict=True):
            self.lengths[slot] = self.lengths[step.prefill_slots[chunk]]
            rows.append((slot, chunk_contexts[chunk]))
        return replace_fields(self._sample(step.number, rows), **self._score(step, writes[step.decode_slots.size :]))

    def _score(self, step: Step, chunks: list[tuple[int, list[int]]]) -> dict[str, Any]:
        found = []
        for chunk, after, count in zip(step.scored_chunks, step.scored_next, step.scored_counts, strict=True):
            slot, tokens = chunks[chunk]
            start = self.lengths[slot] - len(tokens)
            targets = tokens[1:] + ([int(after)] if after >= 0 else [])
            for position, target in enumerate(targets, start):
                found.append((*score(self._read(step.number, slot, position), target, int(count)), int(count)))
        width = int(step.scored_counts.max(initial=0))
        tops = [ids + [-1] * (width - count) for _, _, ids, count in found]
        return {
            "scored_logprobs": np.asarray([each[0] for each in found], np.float32),
            "scored_ranks": np.asarray([each[1] for each in found], np.int32),
            "scored_top_tokens": np.asarray(tops, np.int32).reshape(-1),
            "scored_top_logprobs": np.zeros(len(found) * width, np.float32),
            "scored_top_width": width,
        }

    def _set_up(self, step: Step) -> None:
        new = step.new
        for index, slot in enumerate(new.slots.tolist()):
            self.table[slot] = -1
            self.lengths[slot] = int(new["length"][index])
            self.num_sampled[slot] = int(new["num_sampled"][index])
            self.seeds[slot] = int(new["seed"][index])
            self.num_logprobs[slot] = int(new["num_logprobs"][index])
            penalties = (new[f"{name}_penalty"][index] for name in ("presence", "frequency", "repetition"))
            self.penalties[slot] = tuple(map(float, penalties))
        for each in step.edits:
            for slot in each.slots.tolist():
                assert slot in new.slots.tolist()
                self.penalties[slot] += (digest_of(each.edits),)
        self.table[step.append_slots, step.append_indices] = step.append_pages
        assert len(set(step.copy_to.tolist())) == step.copy_to.size
        assert not set(step.copy_to.tolist()) & set(step.copy_from.tolist())
        self.pages[step.copy_to] = self.pages[step.copy_from]
        self.writers[step.copy_to] = self.writers[step.copy_from]

    def _write(self, number: int, slot: int, tokens: list[int]) -> None:
        position = self.lengths[slot]
        previous = self._read(number, slot, position - 1) if position else 0
        for token in tokens:
            column, offset = divmod(position, self.sizes.page_size)
            page = self.table[slot, column]
            assert page >= 0, "a write beyond the slot's pages"
            previous = self.model.kv(previous, token)
            self.pages[page, offset] = previous
            self.writers[page, offset] = number, slot
            position += 1
        self.lengths[slot] = position

    def _read(self, number: int, slot: int, position: int) -> int:
        column, offset = divmod(position, self.sizes.page_size)
        page = self.table[slot, column]
        assert page >= 0, "a read beyond the slot's pages"
        writer_step, writer_slot = self.writers[page, offset].tolist()
        assert writer_step >= 0, "a read of a page that nobody wrote"
        assert writer_step < number or writer_slot == slot, "a read of what another slot writes in the same step"
        return int(self.pages[page, offset])

    def _context(self, number: int, slot: int) -> list[int]:
        return [self._read(number, slot, position) for position in range(self.lengths[slot])]

    def _sample(self, number: int, rows: list[tuple[int, list[int]]]) -> Tokens:
        ids, logprobs, top_rows = [], [], []
        tops: list[tuple[int, float, int]] = []
        for row, (slot, context) in enumerate(rows):
            token, logprob = self.model.sample(context, self.seeds[slot], self.num_sampled[slot], self.penalties[slot])
            self.num_sampled[slot] += 1
            self.last_tokens[slot] = token
            self.sampled_in[slot] = number
            ids.append(token)
            logprobs.append(logprob)
            if self.num_logprobs[slot] > 0:
                top_rows.append(row)
                tops.append((token, logprob, self.num_logprobs[slot]))
        width = max((count for _, _, count in tops), default=0)
        top_tokens = np.full((len(tops), width), -1, np.int32)
        top_logprobs = np.full((len(tops), width), np.nan, np.float32)
        for index, (token, logprob, count) in enumerate(tops):
            top_tokens[index, :count] = token + np.arange(count)
            top_logprobs[index, :count] = logprob
        asked = any(self.num_logprobs[slot] >= 0 for slot, _ in rows)
        return Tokens(
            number=number,
            ids=np.asarray(ids, np.int32),
            logprobs=np.asarray(logprobs if asked else [], np.float32),
            top_rows=np.asarray(top_rows, np.int32),
            top_tokens=top_tokens.reshape(-1),
            top_logprobs=top_logprobs.reshape(-1),
            top_width=width,
        )

    def _check_groups(self, step: Step) -> None:
        groups = list(
            zip(
                step.group_first_rows.tolist(),
                step.group_num_rows.tolist(),
                step.group_first_columns.tolist(),
                step.group_num_columns.tolist(),
                strict=True,
            )
        )
        assert groups == sorted(groups, key=lambda group: (group[2], group[0])), "groups are not sorted"
        covered: dict[int, int] = {}  # row -> column where its innermost group so far ends
        for first_row, num_rows, first_column, num_columns in groups:
            assert min(num_rows, num_columns) >= 1
            members = step.decode_slots[first_row : first_row + num_rows]
            assert members.size == num_rows, "a group reaches beyond the rows"
            columns = self.table[members, first_column : first_column + num_columns]
            assert (columns == columns[0]).all(), "members of a group have different pages"
            for row, slot in enumerate(members.tolist(), first_row):
                assert covered.get(row, 0) == first_column, "an inner group does not begin where its outer ends"
                covered[row] = first_column + num_columns
                assert self.lengths[slot] >= covered[row] * self.sizes.page_size, "a group has a page that is not full"
        self.num_shared_rows += len(covered)


@dataclass
class Result:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: dict[int, tuple[list[int], list[float]]] = field(default_factory=dict)
    reason: int | None = None
    num_tokens: int = 0
    scores: dict[int, tuple[float, int, list[int]]] = field(default_factory=dict)


def small_sizes(**changes: int) -> Sizes:
    values = {
        "num_pages": 64,
        "page_size": 4,
        "num_slots": 8,
        "max_running": 8,
        "max_tokens_per_forward": 24,
        "max_prefill_tokens": 24,
        "max_lone_prefill_tokens": 24,
        "steps_ahead": 2,
        "max_pages_per_seq": 32,
        "max_request_tokens": 128,
    } | changes
    return Sizes(**values)


class Harness:
    """Drives a Manager with a SimulatedWorker and collects what each stream got."""

    def __init__(
        self, sizes: Sizes | None = None, model: HashModel | None = None, config: EngineConfig | None = None
    ) -> None:
        self.model = model or HashModel()
        self.config = config or EngineConfig(hydragen_min_group_size=2, hydragen_min_prefix_len=4)
        self.sizes = sizes or small_sizes()
        if self.config.scheduling_steps_ahead:
            self.sizes = replace(self.sizes, steps_ahead=self.config.scheduling_steps_ahead)
        self.now = 0.0
        self.seconds_of: Callable[[Step], float] = lambda step: 0.0
        """The time of a step."""
        self.manager = Manager(self.config, self.sizes, lambda: self.now)
        lanes = self.manager.state.lanes
        for rows in [self.manager.state.rows] if lanes is None else lanes.every:
            rows.policy = replace(
                rows.policy, row_cost=0, group_cost=0, regroup_cost=0, regroup_row_cost=0
            )  # so that small groups pay
        self.worker = SimulatedWorker(self.sizes, self.model)
        self.sent: deque[Step] = deque()
        self.writes: deque[set[tuple[int, int]]] = deque()  # per step in flight: (page, slot)
        self.copied: deque[set[int]] = deque()  # per step in flight: pages that it copies
        self.results: dict[int, Result] = {}
        self.submits: dict[int, tuple[Submit, int]] = {}
        self.refused: set[int] = set()
        self.refusals: list[Refused] = []
        self.cancelled: set[int] = set()
        self.num_streams = 0
        self.num_steps = 0

    def submit(
        self,
        prompt: list[int],
        *,
        n: int = 1,
        max_tokens: int = 8,
        seed: int = -1,
        stop_ids: tuple[int, ...] = (),
        deliver_each: bool = False,
        num_logprobs: int = -1,
        first_choice: int = 0,
        edits: LogitEdits | None = None,
        delivers_stop: bool = False,
        prompt_logprobs: int = -1,
        priority: int = 0,
        timeout_s: float = 0.0,
        is_streamed: bool = False,
        **penalties: float,
    ) -> list[int]:
        sampling = Sampling(seed=seed, num_logprobs=num_logprobs, **penalties)
        first = self.num_streams
        ids = np.asarray(prompt, np.int32)
        submit = Submit(
            first, n, ids, max_tokens, sampling, stop_ids, deliver_each, first_choice,
            edits=edits, delivers_stop=delivers_stop, prompt_logprobs=prompt_logprobs, priority=priority,
            timeout_s=timeout_s, is_streamed=is_streamed,
        )  # fmt: skip
        self.num_streams += n
        answers = self.manager.handle(submit)
        streams = list(range(first, first + n))
        if answers:
            assert isinstance(answers[0], Refused)
            self.refused.update(streams)
            self.refusals.append(answers[0])
            return []
        for choice, stream in enumerate(streams):
            self.submits[stream] = submit, first_choice + choice
            self.results[stream] = Result()
        return streams

    def cancel(self, *streams: int) -> None:
        self.cancelled.update(stream for stream in streams if self.results[stream].reason is None)
        self.manager.handle(Cancel(np.asarray(streams, np.int64)))

    def plan(self, most: int | None = None) -> int:
        """Send every step that the manager can plan now, or `most` of them; return how many."""
        count = 0
        while count != most and (step := self.manager.plan()):
            self._check_sent(step)
            self.sent.append(step)
            count += 1
            assert len(self.sent) <= max(1, self.sizes.steps_ahead)
        return count

    def return_one(self) -> None:
        """Run the oldest step that was sent and hand its tokens to the manager."""
        step = self.sent.popleft()
        self.writes.popleft()
        self.copied.popleft()
        seconds = self.seconds_of(step)
        self.now += seconds
        for deltas in self.manager.receive(replace_fields(self.worker.run(step), step_wall_s=seconds)):
            if isinstance(deltas, PromptLogprobs):
                self._take_scores(deltas)
            else:
                self._take(deltas)
        self.num_steps += 1

    def turn(self, count: int) -> None:
        """Plan what can be planned and take the oldest step's tokens, `count` times."""
        for _ in range(count):
            self.plan()
            self.return_one()

    def run(self, max_steps: int = 20_000) -> None:
        """Go on until nothing is left to do."""
        while self.plan() or self.sent:
            self.return_one()
            assert self.num_steps < max_steps, "no progress"

    def check_results(self) -> None:
        """Each stream that was not cancelled ended once, as the reference does."""
        for stream, (submit, choice) in self.submits.items():
            result, expected = self.results[stream], reference(self.model, submit, choice)
            if stream == submit.first_stream and stream not in self.cancelled:
                self._check_scores(submit, result)
            if stream in self.cancelled:
                assert result.reason is None
                assert result.tokens == expected.tokens[: len(result.tokens)]
                continue
            assert result.reason == expected.reason, (stream, result, expected)
            assert result.tokens == expected.tokens
            assert result.num_tokens == expected.num_tokens
            if submit.sampling.num_logprobs >= 0:
                assert np.allclose(result.logprobs, expected.logprobs)
            else:
                assert np.isnan(result.logprobs).all()
            if submit.sampling.num_logprobs > 0:
                width = submit.sampling.num_logprobs
                assert sorted(result.tops) == list(range(len(result.tokens)))
                for index, (ids, logprobs) in result.tops.items():
                    assert ids[:width] == [result.tokens[index] + rank for rank in range(width)]
                    assert np.allclose(logprobs[:width], expected.logprobs[index])
                    assert set(ids[width:]) <= {-1}
                    assert np.isnan(logprobs[width:]).all()

    def _check_scores(self, submit: Submit, result: Result) -> None:
        expected = reference_scores(self.model, submit)
        assert sorted(result.scores) == sorted(expected)
        for position, (logprob, rank, tops) in expected.items():
            assert abs(result.scores[position][0] - logprob) < 1e-5
            assert result.scores[position][1:] == (rank, tops)

    def check_nothing_held(self) -> None:
        """Idle: only the prefix tree holds pages, and nothing remembers any stream."""
        state = self.manager.state
        assert state.pages.allocator.num_used == 0
        assert not state.pages.allocator.refs.any()
        assert (
            state.pages.allocator.num_cached_only == len(state.pages.tree) == int(state.pages.allocator.is_cached.sum())
        )
        assert state.slots.num_free == self.sizes.num_slots
        assert (state.slots.num_running, state.queue.num_choices) == (0, 0)
        for held in (state.where, state.queue, state.prefills, state.copies, state.in_flight, state.slots.retiring):
            assert not held
        assert not state.pages.held
        assert not state.pending_pages
        assert not self.manager.has_work

    def _check_sent(self, step: Step) -> None:
        """Checks who owns what at the time of planning, which the worker cannot know."""
        state = self.manager.state
        in_flight_slots = {
            slot
            for sent in self.sent
            for named in (sent.decode_slots, sent.prefill_slots, sent.fanout_slots)
            for slot in named.tolist()
        }
        assert not in_flight_slots & set(step.new.slots.tolist()), "a slot is reused while a step still names it"
        given = set(step.append_pages.tolist())
        assert not given & set(step.copy_from.tolist()), "a page is given away before it is copied"
        assert not given & set().union(*self.copied), "a step on its way still copies this page"
        self.copied.append(set(step.copy_from.tolist()))
        written = set()
        table, size = state.slots.table, self.sizes.page_size
        for slot in step.decode_slots.tolist():
            written.add((int(table[slot, (state.slots.lengths[slot] - 1) // size]), slot))
        chunks = zip(step.prefill_slots, step.prefill_starts, step.prefill_lengths, strict=True)
        for slot, start, length in chunks:
            for column in range(start // size, (start + length - 1) // size + 1):
                written.add((int(table[slot, column]), int(slot)))
        pages = [page for page, _ in written]
        assert len(pages) == len(set(pages)), "two slots write one page"
        fanned_out = step.prefill_slots[step.fanout_chunks].tolist()
        for page, slot in written:
            if slot not in fanned_out:
                num_held = sum(page in pages.tolist() for _, pages in state.pages.held)
                assert state.pages.allocator.refs[page] == 1 + num_held, "a write to a shared page"
            for earlier in self.writes:
                for other_page, other_slot in earlier:
                    assert other_page != page or other_slot == slot, "a step on its way still writes this page"
        self.writes.append(written)

    def _take_scores(self, found: PromptLogprobs) -> None:
        submit, _ = self.submits[found.first_stream]
        for stream in range(submit.first_stream, submit.first_stream + submit.num_choices):
            assert not self.results[stream].tokens, "tokens came before the prompt's logprobs"
        scores = self.results[found.first_stream].scores
        assert found.start <= len(scores) + 1, "a gap"
        tops = found.top_tokens.reshape(found.logprobs.size, -1).tolist()
        for index, top in enumerate(tops):
            asked, beyond = top[: submit.prompt_logprobs], top[submit.prompt_logprobs :]
            assert set(beyond) <= {-1}
            scores[found.start + index] = float(found.logprobs[index]), int(found.ranks[index]), asked

    def _take(self, deltas: Deltas) -> None:
        for index, (stream, token) in enumerate(zip(deltas.streams.tolist(), deltas.tokens.tolist(), strict=True)):
            result = self.results[stream]
            assert result.reason is None
            result.tokens.append(token)
            result.logprobs.append(float(deltas.logprobs[index]) if deltas.logprobs.size else float("nan"))
        tops = self._tops(deltas)
        if not deltas.top_of_ended:
            for index, top in tops.items():
                result = self.results[int(deltas.streams[index])]
                result.tops[len(result.tokens) - 1] = top
        start = 0
        for index, stream in enumerate(deltas.ended.tolist()):
            result = self.results[stream]
            assert result.reason is None, "a stream ended twice"
            assert stream not in self.cancelled
            result.reason = int(deltas.ended_reasons[index])
            result.num_tokens = int(deltas.ended_num_tokens[index])
            end = start + int(deltas.ended_lengths[index])
            if end > start:
                result.tokens += deltas.ended_tokens[start:end].tolist()
                if deltas.ended_logprobs.size:
                    result.logprobs += deltas.ended_logprobs[start:end].tolist()
            if deltas.top_of_ended:
                result.tops = {at - start: top for at, top in tops.items() if start <= at < end}
            start = end

    def _tops(self, deltas: Deltas) -> dict[int, tuple[list[int], list[float]]]:
        width = deltas.top_width
        return {
            row: (
                deltas.top_tokens[index * width : (index + 1) * width].tolist(),
                deltas.top_logprobs[index * width : (index + 1) * width].tolist(),
            )
            for index, row in enumerate(deltas.top_rows.tolist())
        }
