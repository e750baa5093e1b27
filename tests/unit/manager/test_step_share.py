"""Background work is kept to its share of each step, by the time that steps are found to take."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from toka_engine.manager.step_time import OnlineSteps, StepCosts, StepSize, StepTimes
from toka_engine.messages import Step

from tests.unit.manager.simulated import Harness, small_sizes
from tests.unit.manager.timed import CALM, SIZES, Machine, Shape, TimedEngine


def seconds_of(step: Step, row_s: float) -> float:
    return 0.02 + row_s * step.decode_slots.size + 0.002 * int(step.prefill_lengths.sum())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("machine", "shape", "seconds"),
    [(CALM, Shape(), 150.0), (CALM, Shape(prompt=(100, 400), output=(40, 120)), 150.0), (Machine(), Shape(), 400.0)],
    ids=["calm", "longer", "busy"],
)
def test_a_batch_leaves_online_tokens_as_fast_at_half_load_and_has_most_of_what_is_left(
    machine: Machine, shape: Shape, seconds: float
) -> None:
    saturated = TimedEngine(machine, rate=50.0, num_lines=0, shape=shape)
    saturated.run(seconds / 10)
    peak = saturated.times[False].num_tokens / (seconds / 10)
    lone = TimedEngine(machine, rate=0.0, num_lines=224, shape=shape)
    lone.run(seconds / 5)
    batch_alone = lone.times[True].num_tokens / (seconds / 5)
    rate = 0.5 * peak / (sum(shape.output) / 2)
    alone = TimedEngine(machine, rate=rate, num_lines=0, shape=shape)
    beside = TimedEngine(machine, rate=rate, num_lines=224, shape=shape)
    for engine in (alone, beside):
        engine.run(seconds)
    first, second = alone.times[False], beside.times[False]
    assert second.gap_ms(99) <= 1.2 * first.gap_ms(99)
    assert second.first_ms(99) <= 1.5 * first.first_ms(99)
    assert beside.times[True].num_tokens / seconds >= 0.6 * batch_alone * 0.5


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_where_gaps_have_a_target_a_batch_has_more_of_what_is_left(seed: int) -> None:
    """An 8B on an H200, whose steps with prompts take the host 13.5 ms: 1.11 x, 1.14 x and 56 % were measured there
    with the share that a batch has where there is no target, and 1.04 x, 1.04 x and 57 % are found here.
    """
    sizes = replace(
        SIZES, num_pages=60_000, num_slots=4096, max_running=2048, max_tokens_per_forward=8192,
        max_prefill_tokens=4096, max_lone_prefill_tokens=8192, target_gap_s=0.03,
    )  # fmt: skip
    machine = Machine(step_ms=6.5, row_ms=0.012, context_ms=0.000035, prefill_ms=0.024, least_mixed_ms=13.5, noise=0.03)
    shape, seconds = Shape(is_streamed=True), 20.0

    def run(rate: float, num_lines: int, line_priority: int = 100) -> TimedEngine:
        engine = TimedEngine(
            machine, rate=rate, num_lines=num_lines, shape=shape, line_shape=shape if not line_priority else Shape(),
            line_priority=line_priority, sizes=sizes, seed=seed,
        )  # fmt: skip
        engine.run(seconds, settle_s=5.0)
        return engine

    peak = run(0.0, 256, line_priority=0).times[True].num_tokens
    rate = 0.5 * peak / seconds / (sum(shape.output) / 2)
    alone, beside = run(rate, 0), run(rate, 512)
    first, second = alone.times[False], beside.times[False]
    assert second.gap_ms(99) <= 1.2 * first.gap_ms(99)
    assert second.first_ms(99) <= 1.5 * first.first_ms(99)
    assert beside.times[True].num_tokens >= 0.7 * (peak - second.num_tokens)


def test_a_request_does_not_wait_for_a_long_prompt_of_background_work() -> None:
    harness = Harness(small_sizes(num_pages=200, max_pages_per_seq=64, max_request_tokens=250))
    harness.submit([1, 2, 3], max_tokens=100)
    harness.turn(4)
    harness.submit(list(range(200)), max_tokens=2, priority=100)
    harness.turn(3)
    harness.submit([4, 5, 6], max_tokens=2)
    harness.turn(6)
    assert 2 not in harness.manager.state.where, "it has ended"
    assert harness.results[1].reason is None
    harness.run()
    harness.check_results()
    harness.check_nothing_held()


def learned(harness: Harness, row_s: float = 0.004) -> Harness:
    """Let the manager see enough background steps of several sizes."""
    harness.seconds_of = partial(seconds_of, row_s=row_s)
    for index in range(6):
        harness.submit([9, index], max_tokens=60 + 3 * index, priority=100)
    harness.run()
    assert harness.manager.state.step_times.costs is not None
    return harness


def test_background_rows_sit_out_beside_an_online_stream_and_all_tokens_come() -> None:
    harness = learned(Harness(small_sizes(max_running=20, num_slots=20, num_pages=200)))
    background = [harness.submit([8, index], max_tokens=40, priority=100)[0] for index in range(10)]
    harness.turn(6)
    assert harness.sent[-1].decode_slots.size >= 8
    harness.submit([1, 2, 3], max_tokens=60)
    harness.turn(8)
    # Beside one online row, a step may take 1.6 times as long as without background rows.
    assert all(2 <= step.decode_slots.size <= 5 for step in harness.sent)
    harness.run()
    assert all(harness.results[stream].reason is not None for stream in background)
    harness.check_results()
    harness.check_nothing_held()


def test_background_rows_get_next_to_nothing_where_requests_are_refused() -> None:
    harness = learned(Harness(small_sizes(max_running=20, num_slots=20, num_pages=200)), row_s=0.001)
    for index in range(10):
        harness.submit([8, index], max_tokens=60, priority=100)
    harness.submit([1, 2, 3], max_tokens=100)
    harness.turn(8)
    assert harness.sent[-1].decode_slots.size > 2
    harness.submit([1, 2], max_tokens=30, timeout_s=0.75)
    assert [refused.code for refused in harness.refusals] == ["deadline_unreachable"]
    harness.turn(3)
    assert harness.sent[-1].decode_slots.size == 2
    harness.now += 11.0
    harness.turn(3)
    assert harness.sent[-1].decode_slots.size > 2
    harness.run()
    harness.check_results()


def test_background_work_alone_takes_every_row_once_no_request_is_expected() -> None:
    harness = learned(Harness(small_sizes(max_running=20, num_slots=20, num_pages=200)))
    for index in range(10):
        harness.submit([8, index], max_tokens=60, priority=100)
    harness.submit([1, 2, 3], max_tokens=2)
    harness.turn(12)
    assert harness.plan() == 1, "the next step waits, so that a request does not wait for it"
    assert harness.sent[-1].decode_slots.size < 10
    harness.now += 61.0
    harness.turn(3)
    assert harness.plan()
    assert harness.sent[-1].decode_slots.size == 10
    harness.run()
    harness.check_results()


def test_the_costs_of_steps_are_found_and_none_is_below_zero() -> None:
    times, chance = StepTimes(), np.random.default_rng(1)
    true = StepCosts(step_s=0.05, row_s=0.003, context_s=2e-6, prefill_s=0.001)
    for _ in range(400):
        rows = int(chance.integers(0, 60))
        size = StepSize(rows, rows * int(chance.integers(20, 900)), int(chance.choice([0, 0, 30, 128])))
        times.note(size, true.predict_s(size) * float(chance.lognormal(0.0, 0.05)))
    assert times.costs is not None
    assert times.costs.step_s == pytest.approx(true.step_s, rel=0.1)
    assert times.costs.row_s == pytest.approx(true.row_s, rel=0.15)
    assert times.costs.prefill_s == pytest.approx(true.prefill_s, rel=0.1)
    for _ in range(1500):
        times.note(StepSize(4, 4000, 0), 0.01)  # nothing changes any more
    assert min(times.costs.step_s, times.costs.row_s, times.costs.context_s, times.costs.prefill_s) >= 0.0
    assert times.costs.predict_s(StepSize(4, 4000, 0)) == pytest.approx(0.01, rel=0.2)


def test_steps_that_take_no_time_predict_nothing() -> None:
    times = StepTimes()
    for _ in range(100):
        times.note(StepSize(3, 30, 8), 0.0)
    assert times.costs is None


def test_the_longer_online_steps_and_those_with_a_prompt_are_known() -> None:
    steps, costs = OnlineSteps(), StepCosts(0.01, 0.001, 0.0, 0.001)
    for number in range(200):
        steps.note(StepSize(4, 100, 64 if number % 10 == 0 else 0), costs, float(number), 14)
    assert steps.long_step_s == pytest.approx(0.078)
    assert steps.prompt_step_s == pytest.approx(0.078)
    assert steps.seen_s == 199.0
