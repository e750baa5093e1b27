"""Grammars in the manager: each source goes to the workers once, and no stream runs before they have compiled it."""

from __future__ import annotations

import numpy as np
from toka_engine.grammar.source import GrammarSource
from toka_engine.manager.grammars import MAX_GRAMMARS, MAX_SOURCE_BYTES, Grammars
from toka_engine.manager.lifecycle import preempt_newest
from toka_engine.messages import (
    FINISH_GRAMMAR,
    FINISH_LENGTH,
    GRAMMAR_FAILED,
    Cancel,
    Deltas,
    Grammar,
    GrammarReady,
    Step,
    Submit,
    Tokens,
)
from toka_engine.slot_parameters import Sampling

from tests.unit.manager.simulated import Harness, small_sizes

SOURCE = GrammarSource("regex", "a+")
OTHER = GrammarSource("regex", "b+")


def submit(harness: Harness, first: int, source: GrammarSource | None, num_choices: int = 1, length: int = 5) -> None:
    prompt = np.arange(length, dtype=np.int32)
    harness.manager.handle(Submit(first, num_choices, prompt, 6, Sampling(), (), False, grammar=source))


def run_to_the_end(harness: Harness) -> dict[int, int]:
    """Execute steps with token 1 for every row; return how each stream ended."""
    ends: dict[int, int] = {}
    while step := harness.manager.plan():
        take_ends(ends, harness.manager.receive(answer(step)))
    return ends


def answer(step: Step, token: int = 1) -> Tokens:
    return Tokens(step.number, np.full(step.decode_slots.size + step.fanout_slots.size, token, np.int32))


def take_ends(ends: dict[int, int], messages: list[Deltas]) -> None:
    for deltas in messages:
        ends |= dict(zip(deltas.ended.tolist(), deltas.ended_reasons.tolist(), strict=True))


def one_step_ahead() -> Harness:
    return Harness(small_sizes(steps_ahead=1))


def test_a_source_goes_to_the_workers_once_and_its_streams_wait_until_all_have_compiled_it() -> None:
    harness = one_step_ahead()
    manager = harness.manager
    manager.state.grammars.num_workers = 2
    submit(harness, 0, SOURCE, 2)
    submit(harness, 2, SOURCE)
    submit(harness, 3, None)
    (sent,) = manager.take_grammars()
    assert sent == Grammar(1, SOURCE)
    assert run_to_the_end(harness) == {3: FINISH_LENGTH}
    manager.note_grammar(GrammarReady(1))
    assert manager.plan() is None
    manager.note_grammar(GrammarReady(1))
    assert run_to_the_end(harness) == dict.fromkeys((0, 1, 2), FINISH_LENGTH)
    harness.check_nothing_held()
    submit(harness, 4, SOURCE)
    assert not manager.take_grammars()
    step = manager.plan()
    assert step is not None
    assert step.new["grammar"].tolist() == [1]


def test_streams_of_a_grammar_that_a_worker_cannot_compile_end_alone() -> None:
    harness = one_step_ahead()
    submit(harness, 0, SOURCE, 2)
    submit(harness, 2, OTHER)
    (deltas,) = harness.manager.note_grammar(GrammarReady(1, "why"))
    assert deltas.ended.tolist() == [0, 1]
    assert set(deltas.ended_reasons.tolist()) == {FINISH_GRAMMAR}
    assert not harness.manager.note_grammar(GrammarReady(1, "another worker"))
    harness.manager.note_grammar(GrammarReady(2))
    assert run_to_the_end(harness) == {2: FINISH_LENGTH}
    harness.check_nothing_held()
    assert len(harness.manager.state.grammars) == 1


def test_a_row_whose_grammar_fails_ends_with_a_reason_of_its_own() -> None:
    harness = one_step_ahead()
    submit(harness, 0, SOURCE)
    harness.manager.note_grammar(GrammarReady(1))
    step = harness.manager.plan()
    assert step is not None
    ends: dict[int, int] = {}
    take_ends(ends, harness.manager.receive(answer(step, GRAMMAR_FAILED)))
    assert ends == {0: FINISH_GRAMMAR}
    harness.check_nothing_held()


def test_a_stream_that_starts_again_after_preemption_brings_its_output_for_the_matcher() -> None:
    harness = one_step_ahead()
    manager = harness.manager
    submit(harness, 0, SOURCE)
    submit(harness, 1, SOURCE, length=9)
    manager.note_grammar(GrammarReady(1))
    for _ in range(3):
        step = manager.plan()
        assert step is not None
        manager.receive(answer(step))
    preempt_newest(manager.state)
    step = manager.plan()
    assert step is not None
    (num_sampled,) = step.new["num_sampled"].tolist()
    assert num_sampled > 0
    assert step.new["grammar"].tolist() == [1]
    assert step.grammar_outputs.tolist() == [1] * num_sampled
    manager.receive(answer(step))
    assert run_to_the_end(harness) == {0: FINISH_LENGTH, 1: FINISH_LENGTH}
    harness.check_nothing_held()


def test_grammars_in_use_stay_and_the_least_recently_used_ones_go() -> None:
    grammars = Grammars()
    used = grammars.use(SOURCE, 1)
    for index in range(MAX_GRAMMARS + 2):
        known = grammars.use(GrammarSource("regex", f"a{{{index}}}"), 1)
        grammars.note_compiled(known.number)
        grammars.release(known)
    assert len(grammars) == MAX_GRAMMARS
    outbox = grammars.take_outbox()
    forgotten = [message.number for message in outbox if message.source is None]
    assert forgotten == [2, 3, 4]
    assert grammars.use(SOURCE, 1) is used


def test_cancelled_streams_use_their_grammar_no_more() -> None:
    harness = one_step_ahead()
    submit(harness, 0, SOURCE, 3)
    harness.manager.note_grammar(GrammarReady(1))
    step = harness.manager.plan()
    assert step is not None
    harness.manager.handle(Cancel(np.arange(3)))
    harness.manager.receive(answer(step))
    assert run_to_the_end(harness) == {}
    assert harness.manager.state.grammars.use(SOURCE, 0).num_users == 0
    harness.check_nothing_held()


def test_unused_grammars_are_forgotten_by_the_bytes_of_their_sources_too() -> None:
    grammars, large = Grammars(), "a" * (MAX_SOURCE_BYTES // 4)
    sources = [GrammarSource("regex", f"{number}{large}") for number in range(6)]
    for source in sources:
        known = grammars.use(source, 1)
        grammars.note_compiled(known.number)
        grammars.release(known)
        assert len(grammars) <= 4
    assert len(grammars) == 3
    assert grammars.use(sources[-1], 1).is_ready, "the last used ones stay"
