"""The times of streams: queue, prefill, decode, between tokens; each counted once, whatever happens to a stream."""

from __future__ import annotations

import numpy as np
import pytest
from toka_engine.histogram import BOUNDS_S, Buckets, Histogram, add_up
from toka_engine.messages import Durations

from tests.unit.manager.simulated import Harness, small_sizes


def run(harness: Harness) -> Durations:
    """Run to the end, a step a second; return what was counted."""
    while harness.plan() or harness.sent:
        harness.now += 1.0
        harness.return_one()
    harness.check_results()
    return harness.manager.stats(0.0, 0.0).durations


def test_a_stream_alone_has_the_time_of_its_steps() -> None:
    harness = Harness(small_sizes(steps_ahead=1))
    harness.submit([1, 2, 3], max_tokens=5)
    found = run(harness)
    assert found.queue.sum_s == 0.0
    assert found.prefill.sum_s == found.first_token.sum_s == 1.0
    assert found.decode.sum_s == found.between_tokens.sum_s == 4.0
    assert sum(found.between_tokens.counts) == 4


def test_each_choice_and_each_token_counts_once() -> None:
    harness = Harness()
    streams = [*harness.submit([1, 2, 3, 4, 5], n=3, max_tokens=7), *harness.submit([1, 2], max_tokens=1)]
    streams += harness.submit([4] * 60, max_tokens=3, deliver_each=True)
    found = run(harness)
    num_tokens = sum(harness.results[stream].num_tokens for stream in streams)
    for buckets in (found.queue, found.prefill, found.first_token, found.decode):
        assert sum(buckets.counts) == len(streams)
    assert sum(found.between_tokens.counts) == num_tokens - len(streams)
    assert found.first_token.sum_s == pytest.approx(found.queue.sum_s + found.prefill.sum_s)


def test_what_waits_for_a_slot_waits_in_the_queue() -> None:
    harness = Harness(small_sizes(max_running=1, num_slots=2, steps_ahead=1))
    for index in range(2):
        harness.submit([index, 1], max_tokens=6)
    found = run(harness)
    assert found.queue.sum_s == pytest.approx(6.0)
    assert found.prefill.sum_s == pytest.approx(2.0)


def test_preempted_streams_count_their_start_once() -> None:
    harness = Harness(small_sizes(num_pages=24))
    for index in range(2):
        harness.submit([7, index] * 4, max_tokens=40, priority=1)
    harness.turn(30)
    harness.submit(list(range(60)), max_tokens=8)
    found = run(harness)
    assert harness.manager.state.counters.preemptions >= 1
    for buckets in (found.queue, found.first_token):
        assert sum(buckets.counts) == 3
    assert sum(found.decode.counts) < 3


def test_streams_preempted_before_their_first_token_count_their_start_once() -> None:
    harness = Harness(small_sizes(num_pages=24, max_prefill_tokens=8, max_lone_prefill_tokens=8))
    harness.submit([7] * 60, max_tokens=8, priority=1)
    harness.turn(2)
    harness.submit(list(range(60)), max_tokens=8)
    found = run(harness)
    assert harness.manager.state.counters.preemptions >= 1
    for buckets in (found.queue, found.prefill, found.first_token, found.decode):
        assert sum(buckets.counts) == 2
    assert found.first_token.sum_s == pytest.approx(found.queue.sum_s + found.prefill.sum_s)


def test_idle_time_counts_nowhere() -> None:
    harness = Harness(small_sizes(steps_ahead=1))
    for _ in range(2):
        harness.submit([1, 2, 3], max_tokens=3)
        found = run(harness)
        harness.now += 3600.0
    assert found.between_tokens.sum_s == 4.0
    assert found.decode.sum_s == 4.0


def test_a_histogram_counts_by_bucket_and_adds_up() -> None:
    histogram = Histogram()
    histogram.add(BOUNDS_S[3], 5)
    histogram.add_all(np.asarray([10_000.0, np.nan]))
    found = histogram.report()
    assert (found.counts[3], found.counts[-1], sum(found.counts)) == (5, 1, 6)
    assert add_up([found, found]).counts[3] == 10
    assert add_up([]) == Buckets()
