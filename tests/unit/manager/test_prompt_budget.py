"""Prompts leave the tokens of streamed answers about as far apart as the target says, and do not wait for ever."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from toka_engine.config import EngineConfig
from toka_engine.manager.core import Manager
from toka_engine.manager.prompt_budget import measure_prompt_time
from toka_engine.manager.prompt_turns import PromptTurns
from toka_engine.manager.sizes import choose_sizes
from toka_engine.manager.step_time import StepCosts, StepSize, StepTimes
from toka_engine.messages import Step, StepTime, WorkerReady

from tests.unit.manager.simulated import Harness, small_sizes
from tests.unit.manager.timed import Machine, Shape, TimedEngine

GPU = replace(
    small_sizes(), num_pages=60_000, page_size=16, num_slots=4096, max_running=4096, max_tokens_per_forward=8192,
    max_prefill_tokens=4096, max_lone_prefill_tokens=8192, steps_ahead=3, max_pages_per_seq=1024,
    max_request_tokens=16_384,
)  # fmt: skip
LLAMA_8B = Machine(step_ms=5.0, row_ms=0.006, context_ms=37e-6, prefill_ms=0.023, chunk_context_ms=1.1e-6, noise=0.03)
"""One H200, as measured: 43 k tokens of prompts a second, 8 to 12 ms for a step of 256 rows."""
LLAMA_1B = Machine(step_ms=1.0, row_ms=0.003, context_ms=8e-6, prefill_ms=0.0038, chunk_context_ms=2e-7, noise=0.03)
CHAT = Shape((512, 512), (256, 256), is_streamed=True)
LONG = Shape((8192, 8192), (1, 1))


def run(machine: Machine, target_ms: float, seconds: float, *, clients: int, **others: Any) -> TimedEngine:
    """`clients` chat all the time."""
    others = {"rate": 0.0, "line_shape": CHAT, **others}
    changes = {name: others.pop(name) for name in [*others] if hasattr(GPU, name)}
    sizes = replace(GPU, target_gap_s=target_ms * 1e-3, **changes)
    engine = TimedEngine(machine, num_lines=clients, line_priority=0, sizes=sizes, **others)
    engine.run(seconds, settle_s=0.0)
    return engine


def test_a_chat_with_256_streams_has_short_gaps_and_loses_no_throughput() -> None:
    before, after = (run(LLAMA_8B, target, 20.0, clients=256).times[True] for target in (0.0, 30.0))
    assert before.gap_ms(99) > 100
    assert after.gap_ms(99) < 35
    assert after.num_tokens > 0.97 * before.num_tokens
    assert after.first_ms(99) < 1.35 * before.first_ms(99), "all come at once"


def test_streams_have_short_gaps_while_long_prompts_come() -> None:
    before, after = (run(LLAMA_8B, target, 20.0, clients=64, rate=2.0, shape=LONG) for target in (0.0, 30.0))
    assert before.times[True].gap_ms(99) > 110
    assert after.times[True].gap_ms(99) < 35
    assert after.times[True].num_tokens > 0.97 * before.times[True].num_tokens
    assert after.times[False].first_ms(99) < 2.0 * before.times[False].first_ms(99)


def test_a_model_whose_steps_are_short_loses_nothing() -> None:
    before, after = (run(LLAMA_1B, target, 4.0, clients=256).times[True] for target in (0.0, 30.0))
    assert after.num_tokens > 0.99 * before.num_tokens
    assert after.first_ms(99) < 1.1 * before.first_ms(99)


def test_answers_that_are_not_streamed_have_steps_of_any_length() -> None:
    before, after = (
        run(LLAMA_8B, target, 10.0, clients=256, line_shape=replace(CHAT, is_streamed=False)).times[True]
        for target in (0.0, 30.0)
    )
    assert after == before, "the same steps at the same moments"


def test_prompts_that_come_faster_than_the_target_allows_wait_for_seconds_and_not_for_ever() -> None:
    # Beside 100 rows, which take 14 ms, steps of 35 ms have time for 25 prompts a second, and the longest ones for 37.
    machine = Machine(step_ms=5.0, row_ms=0.09, context_ms=0.0, prefill_ms=0.23, noise=0.03)
    few = {"max_tokens_per_forward": 820, "max_prefill_tokens": 410, "max_lone_prefill_tokens": 820}
    chat, shape = replace(CHAT, prompt=(16, 16), output=(4000, 4000)), Shape((102, 102), (1, 1))
    engine = run(machine, 35.0, 100.0, clients=100, line_shape=chat, rate=32.0, shape=shape, **few)
    waits_s = engine.times[False].first_s
    assert len(waits_s) > 0.85 * 32 * 100
    assert 6.0 < max(waits_s) < 12.0, "from 5 s on steps are longer; at 10 s twice as long"
    assert max(waits_s[-300:]) < 1.15 * max(waits_s[-1000:-700]), "they wait no longer from some time on"
    assert 40 < engine.times[True].gap_ms(99) < 70


def test_the_time_for_its_turn_is_counted_and_not_that_for_pages() -> None:
    turns = PromptTurns()
    assert turns.measure_wait_s(1.0, now=9.0) == 0.0
    turns.note(5, lambda: 9.0)
    assert turns.measure_wait_s(1.0, now=10.0) == 0.0, "there was room for it: it waits for something else"
    turns.note(0, lambda: 10.0)
    turns.note(-3, lambda: 11.0)
    assert turns.measure_wait_s(1.0, now=12.0) == 2.0
    assert turns.measure_wait_s(11.5, now=12.0) == 0.5
    turns.note(1, lambda: 13.0)
    assert turns.measure_wait_s(1.0, now=14.0) == 0.0


def seconds_of(step: Step) -> float:
    return 0.01 + 0.001 * step.decode_slots.size + 0.001 * int(step.prefill_lengths.sum())


def learned(**changes: int) -> Harness:
    """Let a manager with a target of 50 ms see steps of several sizes, each of which takes `seconds_of` it."""
    sizes = replace(small_sizes(num_pages=400, max_pages_per_seq=64, max_request_tokens=256, **changes))
    sizes = replace(sizes, max_tokens_per_forward=200, max_prefill_tokens=190, max_lone_prefill_tokens=200)
    harness = Harness(replace(sizes, target_gap_s=0.05))
    harness.seconds_of = seconds_of
    for index in range(12):
        harness.submit(list(range(3 + 9 * index)), max_tokens=20 + 3 * index, deliver_each=True, is_streamed=True)
    harness.run()
    assert harness.manager.state.step_times.costs is not None
    return harness


def chunks_of(harness: Harness, num_turns: int) -> list[int]:
    """Return the prompt tokens of the next steps that have rows, too."""
    sizes, before = [], harness.seconds_of

    def note(step: Step) -> float:
        if step.decode_slots.size and step.prefill_lengths.size:
            sizes.append(int(step.prefill_lengths.sum()))
        return before(step)

    harness.seconds_of = note
    harness.turn(num_turns)
    return sizes


@pytest.mark.parametrize("asked", [{"is_streamed": True}, {"is_streamed": False}, {"is_streamed": True, "priority": 5}])
def test_only_rows_of_streamed_requests_that_are_not_background_work_limit_a_prompt(asked: dict[str, Any]) -> None:
    harness = learned()
    harness.submit([1, 2, 3], max_tokens=60, deliver_each=True, **asked)
    harness.turn(4)
    harness.submit([7] * 180, max_tokens=2)
    chunks = chunks_of(harness, 8)
    if asked == {"is_streamed": True}:
        assert 30 <= max(chunks) <= 45, "50 ms less 10 for the step and one or two for its rows"
    else:
        assert max(chunks) > 150
    harness.run()
    harness.check_results()
    harness.check_nothing_held()


def test_prompts_have_half_of_a_step_whose_rows_take_longer_than_the_target() -> None:
    harness = learned()
    harness.seconds_of = lambda step: 10 * seconds_of(step)  # a slower machine: 110 ms with one row
    harness.submit([1, 2, 3], max_tokens=250, is_streamed=True, deliver_each=True)
    for index in range(28):
        harness.submit([9, index] * 5, max_tokens=4)
        harness.turn(8)
    harness.submit([1, 2, 3], max_tokens=60, is_streamed=True, deliver_each=True)
    harness.turn(4)
    harness.submit([7] * 180, max_tokens=2)
    assert 6 <= max(chunks_of(harness, 12)) <= 20
    harness.run()
    harness.check_results()


def test_lanes_share_the_target_for_a_streams_token_comes_once_in_all_their_turns() -> None:
    costs = StepCosts(0.005, 0.0, 0.0, 0.001)
    size = StepSize(1, 0, 0)
    for num_lanes, num_few, seconds in ((1, 0, 0.055), (3, 0, 0.015), (3, 100, 0.025)):
        sizes = replace(small_sizes(), target_gap_s=0.06, num_lanes=num_lanes, num_few_rows=num_few)
        harness = Harness(sizes, config=EngineConfig(pp_size=2))
        assert measure_prompt_time(harness.manager.state, costs, size) == pytest.approx(seconds), num_lanes


def test_a_chunks_context_has_a_cost_of_its_own_where_it_differs_from_its_size() -> None:
    true = StepCosts(0.005, 6e-6, 3e-8, 23e-6, 1e-9)

    def learn(starts: Iterable[int]) -> StepCosts:
        times, chance = StepTimes(), np.random.default_rng(2)
        for start in starts:
            rows, length = int(chance.integers(1, 90)), int(chance.choice([0, 600, 1000, 1400]))
            size = StepSize(rows, rows * 600, length, length * (start + length // 2))
            times.note(size, true.predict_s(size) * float(chance.lognormal(0.0, 0.03)))
        assert times.costs is not None
        return times.costs

    costs = learn(np.random.default_rng(1).integers(0, 7000, 400).tolist())
    assert costs.chunk_context_s == pytest.approx(true.chunk_context_s, rel=0.2)
    assert costs.prefill_s == pytest.approx(true.prefill_s, rel=0.1)
    size = StepSize(64, 64 * 600, 1000, 500_000)
    assert learn([0] * 400).predict_s(size) == pytest.approx(true.predict_s(size), rel=0.05)


MEASURED = ((1, 0, 0, 0.0047), (256, 0, 0, 0.008), (256, 256 * 512, 0, 0.0115), (0, 0, 1024, 0.0223))
"""Steps of the warm-up of an 8B on one H200: rows, tokens in their contexts, tokens of a prompt, seconds."""


def begin(pp_size: int = 1) -> StepTimes:
    """Return what a manager knows of steps before the first request."""
    step_times = tuple(StepTime(*each) for each in MEASURED)
    config = EngineConfig(pp_size=pp_size)
    return Manager(config, small_sizes(), lambda: 0.0, step_times=step_times).state.step_times


def test_costs_begin_with_what_the_workers_have_measured() -> None:
    costs = begin().costs
    assert costs is not None
    for num_rows, num_context, num_prefill, seconds in MEASURED:
        size = StepSize(num_rows, num_context, num_prefill, num_prefill * num_prefill // 2)
        assert costs.predict_s(size) == pytest.approx(seconds, rel=0.03)
    assert costs.predict_s(StepSize(100, 60_000, 950, 450_000)) == pytest.approx(0.028, rel=0.15), "as it was"
    assert begin(pp_size=2).costs is None, "those are times of one stage"


def test_first_steps_that_the_machine_holds_up_make_no_row_expensive() -> None:
    # Without contexts among what was measured, one of theirs came to cost as much as a prompt's token.
    times = begin()
    for size, seconds in (
        (StepSize(1, 513, 0), 0.0043),
        (StepSize(1, 514, 0), 0.0394),
        (StepSize(1, 515, 1445, 300_000), 0.0293),
        (StepSize(3, 1542, 1440, 300_000), 0.0384),
    ):
        times.note(size, seconds)
    assert times.costs is not None
    assert times.costs.predict_s(StepSize(6, 3_100, 0)) < 0.012


@pytest.mark.parametrize(
    ("device", "asked", "expected"), [("cuda", None, 30.0), ("cpu", None, 0.0), ("cpu", 20.0, 20.0), ("cuda", 0.0, 0.0)]
)
def test_the_target_is_the_one_asked_for_or_one_for_the_device(
    device: str, asked: float | None, expected: float
) -> None:
    ready = WorkerReady(
        vocab_size=9, max_positions=99, num_pages=9, page_size=16, max_seqs=9, max_tokens_per_forward=99,
        max_pages_per_seq=9, device=device, dtype="float32", num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8,
    )  # fmt: skip
    assert choose_sizes(EngineConfig(target_gap_ms=asked), ready).target_gap_s == pytest.approx(expected * 1e-3)
