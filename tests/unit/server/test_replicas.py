"""Which replica gets a prompt, and what the books say of each: alone, and through the streams of whole requests."""

from __future__ import annotations

import random
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from toka_engine.messages import (
    FINISH_ERROR,
    FINISH_LENGTH,
    FINISH_STOP,
    Cancel,
    Deltas,
    EngineInfo,
    Refused,
    Started,
    Submit,
)
from toka_engine.server.errors import unavailable
from toka_engine.server.generation_spec import GenerationSpec
from toka_engine.server.process import merge_infos
from toka_engine.server.replicas import Submission
from toka_engine.server.streams import Choice, Generation, Streams
from toka_engine.slot_parameters import Sampling

from tests.unit.server.replicas import BLOCK_TOKENS, Managers, make_submit, prompt_of

A, B, C = [b"a1", b"a2", b"a3"], [b"b1", b"b2"], [b"c1"]


def place(managers: Managers, submit: Submit, blocks: list[bytes] | None = None) -> int:
    """Place `submit`, which is not split; return the replica's index."""
    (submission,) = managers.replicas.place(submit, blocks or [])
    return submission.replica.index


# ---------------------------------------------------------------- choice


def test_equal_replicas_take_turns() -> None:
    managers = Managers(3)
    assert [place(managers, make_submit()) for _ in range(6)] == [0, 1, 2, 0, 1, 2]


def test_an_idle_replica_that_was_used_longest_ago_is_first() -> None:
    managers = Managers(2)
    for expected in (0, 1, 0, 1):
        (submission,) = managers.replicas.place(make_submit(), [])
        assert submission.replica.index == expected
        managers.replicas.close_choice(submission, 0)
    assert managers.outstanding == [0, 0]


def test_the_replica_with_fewer_outstanding_tokens_gets_the_next_prompt() -> None:
    managers = Managers(2)
    assert place(managers, make_submit(max_tokens=1000)) == 0
    assert [place(managers, make_submit(max_tokens=100)) for _ in range(9)] == [1] * 9
    assert managers.outstanding == [1010, 990]


def test_a_prompt_goes_where_its_prefix_is_cached_until_that_replica_has_more_to_do_than_that_saves() -> None:
    managers = Managers(2)
    num_prompt = 3 * BLOCK_TOKENS + 1
    submits = [make_submit(num_prompt=num_prompt, max_tokens=50) for _ in range(6)]
    assert [place(managers, submit, A) for submit in submits] == [0, 1, 0, 1, 0, 1], "busy replicas share the load"
    managers = Managers(2)
    for _ in range(4):
        (submission,) = managers.replicas.place(submits[0], A)
        managers.replicas.start(submission, submission.num_guessed_blocks * BLOCK_TOKENS)
        managers.replicas.close_choice(submission, 0)
        assert submission.replica.index == 0, "an idle one is not chosen for being idle"
    assert managers.replicas.guessed_tokens == managers.replicas.cached_tokens == 3 * 3 * BLOCK_TOKENS
    assert place(managers, make_submit(max_tokens=3 * BLOCK_TOKENS - 11)) == 1
    assert place(managers, make_submit(num_prompt=10, max_tokens=10), []) == 0


def test_what_is_cached_is_not_charged() -> None:
    managers = Managers(2)
    submit = make_submit(num_prompt=200, max_tokens=50)
    place(managers, submit, A)
    (again,) = managers.replicas.place(submit, A)
    assert again.replica.index == 1, "the cached prefix saves 192 tokens, 250 are before it"
    assert managers.outstanding == [250, 250]
    (third,) = managers.replicas.place(submit, A)
    assert (third.replica.index, managers.outstanding[0]) == (0, 250 + 8 + 50)


def test_limits_are_charged_by_the_share_that_ended_streams_used_of_theirs() -> None:
    managers = Managers(2)
    for _ in range(2000):
        managers.replicas.learn_end(25, 100)
    place(managers, make_submit(num_prompt=10, max_tokens=100, n=2))
    assert managers.outstanding == [10 + 2 * 25, 0]


def test_the_choices_of_a_prompt_stay_together() -> None:
    managers = Managers(2)
    assert place(managers, make_submit(n=127)) == 0
    assert place(managers, make_submit(n=1024)) == 1, "only one replica is idle"


@pytest.mark.parametrize(("n", "bounds"), [(128, [0, 64, 128]), (1023, [0, 512, 1023])])
def test_many_choices_are_spread_over_idle_replicas_with_their_numbers(n: int, bounds: list[int]) -> None:
    managers = Managers(2)
    parts = managers.replicas.place(make_submit(first_stream=1000, n=n), A)
    assert [(part.replica.index, part.submit.first_stream, part.submit.num_choices) for part in parts] == [
        (0, 1000, bounds[1]),
        (1, 1000 + bounds[1], n - bounds[1]),
    ]
    assert [part.submit.first_choice for part in parts] == bounds[:2]
    assert managers.num_open == [bounds[1], n - bounds[1]]


def give_slots(managers: Managers, num_slots: int) -> None:
    for replica in managers.replicas.all:
        replica.info = EngineInfo(49152, 2048, 65536, num_slots, "cpu", "float32")


def test_choices_that_would_wait_for_a_slot_go_where_slots_are_free() -> None:
    managers = Managers(2)
    give_slots(managers, 4096)
    for number in range(32):
        managers.replicas.place(make_submit(first_stream=256 * number, n=256), A)
    assert managers.num_open == [4096, 4096]


@pytest.mark.parametrize(
    ("num_open", "n", "expected"),
    [
        ((900, 500), 300, [0, 300]),  # there is room for all
        ((900, 500), 600, [76, 524]),
        ((900, 1000), 200, [200, 0]),  # the other one has room for too few
        ((980, 990), 200, [200, 0]),  # so has the chosen one
        ((800, 700), 600, [224, 376]),  # what no slot is free for waits where the rest runs
        ((1024, 1024), 300, [300, 0]),
    ],
)
def test_a_prompt_is_spread_by_free_slots_in_parts_that_are_worth_it(
    num_open: tuple[int, int], n: int, expected: list[int]
) -> None:
    managers = Managers(2)
    give_slots(managers, 1024)
    for replica, count in zip(managers.replicas.all, num_open, strict=True):
        replica.num_open = count
        replica.outstanding = count * 100
    parts = managers.replicas.place(make_submit(n=n), A)
    assert sum(part.submit.num_choices for part in parts) == n
    assert [part.submit.first_choice for part in parts] == [0, *(part.submit.num_choices for part in parts[:-1])]
    assert managers.num_open == [num_open[0] + expected[0], num_open[1] + expected[1]]


def count_found(num_replicas: int, num_running: int, seed: int) -> int:
    """Prompt tokens found by 64 requests for each of 16 prefixes of 1,024 tokens, `num_running` of them at a time.

    Replicas here hold all that they were sent; streams end in any order.
    """
    managers, chance, held = Managers(num_replicas), random.Random(seed), set[tuple[int, int]]()
    blocks = [[f"{prefix} {block}".encode() for block in range(16)] for prefix in range(16)]
    waiting = [prefix for prefix in range(16) for _ in range(64)]
    chance.shuffle(waiting)
    running: list[Submission] = []
    while waiting or running:
        if waiting and len(running) < num_running:
            prefix = waiting.pop()
            num_prompt, max_tokens = 1024 + chance.randint(1, 60), chance.randint(16, 256)
            (submission,) = managers.replicas.place(make_submit(0, 1, num_prompt, max_tokens), blocks[prefix])
            home = prefix, submission.replica.index
            managers.replicas.start(submission, 1024 if home in held else 0)
            held.add(home)
            running.append(submission)
        else:
            ended = running.pop(chance.randrange(len(running)))
            managers.replicas.close_choice(ended, 0)
    assert managers.outstanding == [0] * num_replicas
    return managers.replicas.cached_tokens


@pytest.mark.parametrize("num_running", [1, 8, 128, 1024])
@pytest.mark.parametrize("num_replicas", [2, 4])
def test_prefixes_are_found_nearly_as_often_as_in_one_replica(num_replicas: int, num_running: int) -> None:
    # Alone, each prefix is computed once.
    alone = 16 * 63 * 1024
    assert count_found(num_replicas, num_running, 3) >= 0.95 * alone


def test_a_lost_replica_gets_nothing() -> None:
    managers = Managers(3)
    managers.replicas.all[0].is_lost = True
    assert {place(managers, make_submit()) for _ in range(4)} == {1, 2}
    parts = managers.replicas.place(make_submit(n=200), [])
    assert len(parts) == 1
    assert managers.sent[0] == []


def test_a_wrong_guess_makes_room_for_others() -> None:
    managers = Managers(2, max_blocks=6)
    for blocks in (B, C, A):
        (submission,) = managers.replicas.place(make_submit(num_prompt=65 * len(blocks)), blocks)
        managers.replicas.start(submission, 0)
        managers.replicas.close_choice(submission, 0)
        managers.replicas.all[1].last_used += 10
    first = managers.replicas.all[0].prefixes
    assert [first.count_known(blocks) for blocks in (A, B, C)] == [3, 2, 1]
    (submission,) = managers.replicas.place(make_submit(num_prompt=200), A)
    managers.replicas.start(submission, 2 * BLOCK_TOKENS)
    assert [first.count_known(blocks) for blocks in (A, B, C)] == [3, 1, 1]
    assert managers.replicas.guessed_tokens - managers.replicas.cached_tokens == BLOCK_TOKENS


def test_a_prompt_that_never_started_is_not_taken_to_be_cached() -> None:
    managers = Managers(2)
    (submission,) = managers.replicas.place(make_submit(num_prompt=200), A)
    managers.replicas.close_choice(submission, 0)
    assert managers.replicas.all[0].prefixes.count_known(A) == 0


def test_limits_merge_by_minimum_and_capacities_by_sum() -> None:
    first = EngineInfo(1000, 2048, 65536, 256, "cpu", "float32")
    second = EngineInfo(1000, 4096, 1024, 128, "cpu", "float32")
    assert merge_infos([first, second]) == EngineInfo(1000, 1024, 66560, 384, "cpu", "float32")
    assert merge_infos([second]) is second


# ---------------------------------------------------------------- with whole requests


def begin(streams: Streams, spec: GenerationSpec, num_prompts: int = 1) -> Generation:
    generation = Generation(streams, [prompt_of(10) for _ in range(num_prompts)], spec)
    streams.begin(generation)
    return generation


def spec_of(n: int = 1, max_tokens: int = 20, *, deliver_each: bool = True, num_logprobs: int = -1) -> GenerationSpec:
    return GenerationSpec(n, max_tokens, Sampling(num_logprobs=num_logprobs), (), deliver_each)


def test_a_refused_prompt_tries_one_other_replica_and_then_gets_429() -> None:
    managers = Managers(3)
    streams = Streams(managers.replicas)
    generation = begin(streams, spec_of(n=2))
    streams.on_refused(Refused(0, "full"))
    assert [len(sent) for sent in managers.sent] == [1, 1, 0]
    assert managers.sent[0] == managers.sent[1]
    assert generation._error is None
    assert (managers.outstanding, managers.num_open) == ([0, 50, 0], [0, 2, 0])
    streams.on_refused(Refused(0, "full"))
    assert getattr(generation._error, "status", None) == 429
    streams.end(generation)
    assert (managers.outstanding, managers.num_open) == ([0, 0, 0], [0, 0, 0])
    assert (managers.replicas.num_retries, len(managers.sent[2])) == (1, 0)


def test_what_has_expired_tries_no_other_replica() -> None:
    """Its request may still wait for a client that does not read, so that its streams are known here."""
    managers = Managers(2)
    streams = Streams(managers.replicas)
    generation = begin(streams, spec_of(n=2))
    generation.expire(unavailable("late"))
    streams.on_refused(Refused(0, "full"))
    assert [type(message) for message in managers.sent[0]] == [Submit, Cancel]
    assert managers.sent[1] == []
    streams.end(generation)
    assert (managers.outstanding, managers.num_open) == ([0, 0], [0, 0])


def test_one_replica_refuses_at_once() -> None:
    managers = Managers(1)
    streams = Streams(managers.replicas)
    generation = begin(streams, spec_of())
    streams.on_refused(Refused(0, "full"))
    assert getattr(generation._error, "status", None) == 429


def test_cancellations_go_to_the_replica_of_each_stream() -> None:
    managers = Managers(2)
    streams = Streams(managers.replicas)
    generation = begin(streams, spec_of(n=2), num_prompts=3)
    streams.end(generation)
    cancelled = [
        [message.streams.tolist() for message in sent if isinstance(message, Cancel)] for sent in managers.sent
    ]
    assert cancelled == [[[0, 1, 4, 5]], [[2, 3]]]


def test_the_loss_of_a_replica_ends_its_requests_alone() -> None:
    managers = Managers(2)
    streams = Streams(managers.replicas)
    lost, other, both = begin(streams, spec_of()), begin(streams, spec_of()), begin(streams, spec_of(), num_prompts=2)
    streams.on_deltas(managers.replicas.all[0], ended_deltas([both.choices[0]]))
    streams.fail_replica(managers.replicas.all[0], unavailable("gone"))
    assert [getattr(one._error, "status", None) for one in (lost, other, both)] == [503, None, None]


def ended_deltas(choices: list[Choice], reason: int = FINISH_LENGTH) -> Deltas:
    """The end of `choices`, each with all its tokens: those that are delivered at the end come with it."""
    totals, lengths = [], []
    for choice in choices:
        num_sent = choice.num_taken + len(choice.tokens)
        each = choice.generation.spec.deliver_each
        totals.append(num_sent + (reason == FINISH_STOP) if each else choice.generation.spec.max_tokens)
        lengths.append(0 if each else choice.generation.spec.max_tokens)
    has_logprobs = any(choice.generation.has_logprobs for choice in choices)
    return Deltas(
        ended=np.array([choice.stream for choice in choices], np.int64),
        ended_reasons=np.full(len(choices), reason, np.uint8),
        ended_num_tokens=np.array(totals, np.int32),
        ended_lengths=np.array(lengths, np.int32),
        ended_tokens=np.zeros(sum(lengths), np.int32),
        ended_logprobs=np.zeros(sum(lengths) if has_logprobs else 0, np.float32),
    )


class Books(RuleBasedStateMachine):
    """Requests of every kind, answered, refused, cut, left and lost in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.managers = Managers(3, max_blocks=8)
        self.replicas = self.managers.replicas
        self.streams = Streams(self.replicas)
        self.generations: list[Generation] = []

    @rule(
        n=st.sampled_from([1, 2, 3, 192]),
        max_tokens=st.integers(1, 30),
        deliver_each=st.booleans(),
        num_logprobs=st.sampled_from([-1, 0]),
        paths=st.lists(st.sampled_from([[], A, A[:2], B, C]), min_size=1, max_size=3),
    )
    def submit(self, n: int, max_tokens: int, deliver_each: bool, num_logprobs: int, paths: list[list[bytes]]) -> None:
        spec = spec_of(n, max_tokens, deliver_each=deliver_each, num_logprobs=num_logprobs)
        prompts = [prompt_of(len(blocks) * BLOCK_TOKENS + 7) for blocks in paths]
        generation = Generation(self.streams, prompts, spec, paths)
        self.streams.begin(generation)
        self.generations.append(generation)

    def choices(self, index: int) -> list[Choice]:
        found = [choice for generation in self.generations for choice in generation.choices]
        return [choice for choice in found if choice.submission.replica.index == index and not choice.is_closed]

    @rule(index=st.integers(0, 2), data=st.data(), times=st.integers(1, 3), has_logprobs=st.booleans())
    def deliver(self, index: int, data: Any, times: int, has_logprobs: bool) -> None:
        """Tokens of some streams, and of some that nobody waits for any more."""
        known = [choice.stream for choice in self.choices(index) if choice.generation.spec.deliver_each]
        chosen = data.draw(st.lists(st.sampled_from([*known, 10**9, 10**9 + 1]), unique=True, max_size=5))
        ids = np.array(chosen * times, np.int64)
        logprobs = np.zeros(ids.size if has_logprobs else 0, np.float32)
        self.streams.on_deltas(self.replicas.all[index], Deltas(ids, np.zeros(ids.size, np.int32), logprobs))

    @rule(data=st.data())
    def render(self, data: Any) -> None:
        for generation in self.generations:
            for choice in generation.dirty:
                choice.num_taken += len(choice.tokens)
                choice.tokens = []
            generation.dirty = []

    @rule(index=st.integers(0, 2), num_cached=st.integers(0, 300), data=st.data())
    def start(self, index: int, num_cached: int, data: Any) -> None:
        chosen = data.draw(
            st.lists(st.sampled_from([0, *[choice.stream for choice in self.choices(index)]]), max_size=3)
        )
        self.streams.on_started(Started(np.array(chosen, np.int64), np.full(len(chosen), num_cached, np.int32)))

    @rule(index=st.integers(0, 2), data=st.data(), reason=st.sampled_from([FINISH_STOP, FINISH_LENGTH, FINISH_ERROR]))
    def finish(self, index: int, data: Any, reason: int) -> None:
        if known := self.choices(index):
            chosen = data.draw(st.lists(st.sampled_from(known), unique=True, min_size=1, max_size=200))
            self.streams.on_deltas(self.replicas.all[index], ended_deltas(chosen, reason))

    @precondition(lambda self: self.generations)
    @rule(data=st.data())
    def cut(self, data: Any) -> None:
        generation = data.draw(st.sampled_from(self.generations))
        generation.cut(data.draw(st.sampled_from(generation.choices)))

    @precondition(lambda self: self.generations)
    @rule(data=st.data())
    def refuse(self, data: Any) -> None:
        generation = data.draw(st.sampled_from(self.generations))
        submission = generation.choices[0].submission
        if not submission.is_started and all(
            not one.is_closed and not one.num_taken and not one.tokens
            for one in generation.choices
            if one.submission is submission
        ):
            self.streams.on_refused(Refused(submission.submit.first_stream, "full"))

    @precondition(lambda self: self.generations)
    @rule(data=st.data())
    def leave(self, data: Any) -> None:
        generation = data.draw(st.sampled_from(self.generations))
        self.streams.end(generation)
        self.generations.remove(generation)

    @rule(index=st.integers(0, 1))
    def lose(self, index: int) -> None:
        self.replicas.all[index].is_lost = True
        self.streams.fail_replica(self.replicas.all[index], unavailable("gone"))

    @invariant()
    def books_agree_with_the_open_streams(self) -> None:
        for replica in self.replicas.all:
            choices = self.choices(replica.index)
            assert replica.num_open == len(choices)
            submissions = {id(choice.submission): choice.submission for choice in choices}.values()
            owed = sum(one.prompt_charge for one in submissions)
            owed += sum(one.submission.choice_charge - one.num_taken - len(one.tokens) for one in choices)
            assert replica.outstanding == owed

    def teardown(self) -> None:
        for generation in list(self.generations):
            self.streams.end(generation)
        assert self.managers.outstanding == [0, 0, 0]
        assert self.managers.num_open == [0, 0, 0]


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=60), st.integers(2, 4))
@settings(deadline=None)
def test_no_replica_is_ahead_of_another_by_more_than_one_request(requests: list[tuple[int, int]], num: int) -> None:
    managers = Managers(num)
    for num_prompt, max_tokens in requests:
        place(managers, make_submit(num_prompt=num_prompt, max_tokens=max_tokens))
        assert max(managers.outstanding) - min(managers.outstanding) <= max(sum(request) for request in requests)
