"""Requests that would be late are refused at once; background work starts in the end, under any load."""

from __future__ import annotations

import pytest
from toka_engine.manager.deadlines import StartRate
from toka_engine.manager.priorities import MAX_BACKGROUND_WAIT_S

from tests.unit.manager.simulated import Harness, small_sizes
from tests.unit.manager.timed import CALM, Machine, TimedEngine


def crowded(num_started: int = 12) -> Harness:
    """Return an engine of two slots that takes four seconds for a stream, with 20 streams waiting."""
    harness = Harness(small_sizes(max_running=2, num_slots=4))
    for index in range(20 + num_started):
        harness.submit([index % 30, 1], max_tokens=8)
    while harness.manager.state.queue.num_choices > 20:
        step_of(harness)
    return harness


def step_of(harness: Harness) -> None:
    harness.turn(1)
    harness.now += 0.5


def running(harness: Harness) -> set[int]:
    return {stream for stream, place in harness.manager.state.where.items() if isinstance(place, int)}


def finish(harness: Harness) -> None:
    harness.run()
    harness.check_results()
    harness.check_nothing_held()


def test_a_request_that_would_start_too_late_is_refused_at_once_with_the_time_to_come_again() -> None:
    harness = crowded()
    assert harness.submit([1, 2], timeout_s=5.0) == []
    (refused,) = harness.refusals
    assert refused.code == "deadline_unreachable"
    assert "timeout_s" in refused.message
    assert 20 <= refused.retry_after_s <= 60
    finish(harness)


def test_a_request_that_will_start_in_time_waits_and_does() -> None:
    harness = crowded()
    begun = harness.now
    (stream,) = harness.submit([1, 2], timeout_s=70.0)
    while stream not in running(harness):
        step_of(harness)
    assert 30.0 < harness.now - begun <= 70.0
    finish(harness)


def test_the_time_predicted_is_about_the_time_waited() -> None:
    harness = crowded()
    queue, rate = harness.manager.state.queue, harness.manager.state.start_rate
    predicted = rate.predict_wait_s(queue.busy_s, queue.count_ahead(0))
    begun = harness.now
    (stream,) = harness.submit([1, 2])
    while stream not in running(harness):
        step_of(harness)
    assert harness.now - begun == pytest.approx(predicted, rel=0.25)
    finish(harness)


def test_those_behind_a_request_do_not_count_as_waiting_before_it() -> None:
    harness = crowded()
    (stream,) = harness.submit([1, 2], priority=-1, timeout_s=5.0)
    assert harness.submit([1, 2], priority=10, timeout_s=5.0) == []
    while stream not in running(harness):
        step_of(harness)
    finish(harness)


def test_nobody_is_refused_on_a_guess() -> None:
    """A queue that has not moved yet, and one that was empty for an hour, say nothing."""
    harness = Harness(small_sizes(max_running=2, num_slots=4))
    for index in range(20):
        assert harness.submit([index, 1], timeout_s=0.001)
    finish(harness)
    harness.now += 3600.0
    for index in range(6):
        assert harness.submit([index, 1], timeout_s=30.0)
    finish(harness)


def test_an_idle_hour_does_not_slow_the_rate() -> None:
    rate = StartRate()
    for second in range(20):
        rate.note(float(second), 2)
    assert rate.predict_wait_s(19.0, 0) == 0.0
    assert rate.predict_wait_s(19.0, 9) == pytest.approx(5.0)
    assert rate.predict_wait_s(38.0, 9) == pytest.approx(10.0)


def keep_busy(harness: Harness, background: set[int]) -> None:
    """Go on a second with more requests than fit, all of them before the background."""
    while harness.manager.state.queue.count_ahead(0) < 3:
        harness.submit([harness.num_streams % 30, 2], max_tokens=6)
    harness.turn(1)
    harness.now += 1.0
    assert len(running(harness) & background) <= 1, "old background requests go first one at a time"


def test_a_background_request_starts_at_last_beside_endless_requests_before_it() -> None:
    harness = Harness(small_sizes(max_running=2, num_slots=4))
    for index in range(4):
        harness.submit([index, 2], max_tokens=6)
    background = {harness.submit([9, index], max_tokens=5, priority=100 - index)[0] for index in range(3)}
    while harness.now < MAX_BACKGROUND_WAIT_S - 1.0:
        keep_busy(harness, background)
        assert not running(harness) & background
    while any(harness.results[stream].reason is None for stream in background):
        keep_busy(harness, background)
        assert harness.now < MAX_BACKGROUND_WAIT_S + 100.0
    finish(harness)


def test_a_background_request_with_several_choices_starts_whole() -> None:
    harness = Harness(small_sizes(max_running=3, num_slots=6))
    for index in range(4):
        harness.submit([index, 2], max_tokens=6)
    background = set(harness.submit([9, 9], n=4, max_tokens=5, priority=1))
    while any(harness.results[stream].reason is None for stream in background):
        while harness.manager.state.queue.count_ahead(-1) < 3:
            harness.submit([harness.num_streams % 30, 2], max_tokens=6, priority=-1)
        step_of(harness)
        harness.now += 10.0
        assert harness.now < MAX_BACKGROUND_WAIT_S + 1000.0
    finish(harness)


@pytest.mark.slow
@pytest.mark.parametrize(("machine", "timeout_s", "seconds"), [(CALM, 10.0, 60.0), (Machine(), 40.0, 240.0)])
def test_in_an_overload_requests_with_a_deadline_are_answered_whole_or_refused(
    machine: Machine, timeout_s: float, seconds: float
) -> None:
    peak = TimedEngine(machine, rate=100.0, num_lines=0)
    peak.run(seconds, settle_s=30.0)
    num_most = peak.times[False].num_ended
    pressed = TimedEngine(machine, rate=5 * num_most / seconds, num_lines=224, timeout_s=timeout_s)
    pressed.run(seconds, settle_s=3 * timeout_s)
    times = pressed.times[False]
    assert times.num_ended >= 0.9 * num_most
    assert times.num_expired <= 0.03 * times.num_ended
    assert times.num_refused >= 3 * num_most
    assert pressed.times[True].num_tokens <= 0.05 * times.num_tokens


def taught(max_running: int = 8) -> Harness:
    """Return an engine that knows its steps to take 20 ms, and 10 ms for each row."""
    harness = Harness(small_sizes(max_running=max_running, num_slots=max_running, num_pages=200))
    harness.seconds_of = lambda step: 0.02 + 0.01 * step.decode_slots.size + 0.001 * int(step.prefill_lengths.sum())
    for index in range(6):
        harness.submit([7, index], max_tokens=40 + 5 * index, timeout_s=1000.0)
    harness.run()
    assert harness.manager.state.step_times.costs is not None
    return harness


def test_a_request_that_would_end_too_late_beside_others_is_refused_and_alone_it_is_not() -> None:
    harness = taught()
    for index in range(6):
        harness.submit([index, 1], max_tokens=100)
    harness.turn(3)
    assert harness.submit([1, 2], max_tokens=50, timeout_s=3.0) == []  # 50 steps of 90 ms
    (refused,) = harness.refusals
    assert refused.code == "deadline_unreachable"
    assert "answered" in refused.message
    assert 1 <= refused.retry_after_s <= 4
    assert harness.submit([1, 2], max_tokens=10, timeout_s=3.0)
    finish(harness)
    assert harness.submit([1, 2], max_tokens=50, timeout_s=3.0)
    finish(harness)


def test_a_request_that_is_too_slow_for_its_time_on_an_idle_engine_gets_what_it_can() -> None:
    harness = taught()
    assert harness.submit([1, 2], max_tokens=100, timeout_s=1.0)
    finish(harness)


def test_background_streams_do_not_make_a_request_late() -> None:
    harness = taught()
    for index in range(6):
        harness.submit([index, 1], max_tokens=100, priority=100)
    harness.turn(3)
    assert harness.submit([1, 2], max_tokens=50, timeout_s=3.0)
    finish(harness)
