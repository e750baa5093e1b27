"""Requests with a higher priority go first, and background streams give way to them; nobody's tokens change."""

from __future__ import annotations

from toka_engine.config import EngineConfig

from tests.unit.manager.simulated import Harness, small_sizes


def ended_order(harness: Harness) -> list[int]:
    """Run to the end; return the streams in the order in which they ended."""
    order: list[int] = []
    while harness.plan() or harness.sent:
        harness.return_one()
        order += [
            stream for stream, result in harness.results.items() if result.reason is not None and stream not in order
        ]
    harness.check_results()
    harness.check_nothing_held()
    return order


def running(harness: Harness) -> set[int]:
    return {stream for stream, place in harness.manager.state.where.items() if isinstance(place, int)}


def test_those_of_a_higher_priority_start_first_and_equal_ones_by_arrival() -> None:
    harness = Harness(small_sizes(max_running=1, num_slots=2))
    for priority in (5, 0, 100, -3, 0):
        harness.submit([priority % 7, 1, 2], max_tokens=2, priority=priority)
    assert ended_order(harness) == [3, 1, 4, 0, 2]


def test_a_request_that_finds_every_slot_taken_by_background_streams_gets_one_soon() -> None:
    harness = Harness(small_sizes(max_running=4, num_slots=6))
    background = [harness.submit([9, index], max_tokens=60, priority=100)[0] for index in range(8)]
    harness.turn(6)
    assert running(harness) <= set(background)
    (online,) = harness.submit([1, 2, 3], max_tokens=4)
    harness.turn(6)
    assert online in running(harness) or harness.results[online].reason is not None
    assert harness.manager.state.counters.preemptions >= 1
    assert ended_order(harness)[0] == online


def test_a_request_that_finds_no_pages_takes_those_of_background_streams() -> None:
    harness = Harness(small_sizes(num_pages=24))
    background = [harness.submit([7, index] * 4, max_tokens=40, priority=1)[0] for index in range(2)]
    harness.turn(30)
    (online,) = harness.submit(list(range(60)), max_tokens=8)
    order = ended_order(harness)
    assert order.index(online) < order.index(background[1])
    assert harness.manager.state.counters.preemptions >= 1


def test_streams_of_equal_or_higher_priority_are_never_preempted_for_one_that_waits() -> None:
    for priority in (0, -5):
        harness = Harness(small_sizes(max_running=2, num_slots=4))
        for index in range(2):
            harness.submit([8, index], max_tokens=30, priority=priority)
        harness.turn(5)
        harness.submit([1, 2], max_tokens=2)
        ended_order(harness)
        assert harness.manager.state.counters.preemptions == 0


def test_background_requests_preempt_nobody() -> None:
    harness = Harness(small_sizes(max_running=2, num_slots=4))
    for index in range(2):
        harness.submit([8, index], max_tokens=30, priority=100)
    harness.turn(5)
    harness.submit([1, 2], max_tokens=2, priority=1)
    ended_order(harness)
    assert harness.manager.state.counters.preemptions == 0


def test_a_background_prompt_takes_a_quarter_of_the_prefill_beside_other_streams() -> None:
    harness = Harness(small_sizes(num_pages=200, max_pages_per_seq=64, max_request_tokens=250))
    harness.submit([1, 2, 3], max_tokens=100)
    harness.turn(4)
    harness.submit(list(range(100)), max_tokens=2, priority=100)
    largest = 0
    while not harness.results[1].reason:
        assert harness.plan() or harness.sent
        largest = max(largest, *(step.prefill_tokens.size for step in harness.sent))
        harness.return_one()
    assert 1 <= largest <= 24 // 4
    ended_order(harness)


def test_background_work_alone_takes_whole_steps() -> None:
    harness = Harness(small_sizes(num_pages=200, max_pages_per_seq=64, max_request_tokens=250))
    harness.submit([1, 2, 3], max_tokens=60, priority=100)
    harness.turn(4)
    harness.submit(list(range(100)), max_tokens=2, priority=100)
    largest = 0
    while not harness.results[1].reason:
        assert harness.plan() or harness.sent
        largest = max(largest, *(step.prefill_tokens.size for step in harness.sent))
        harness.return_one()
    assert largest > 24 // 2
    ended_order(harness)


def test_an_engine_without_background_requests_never_looks_for_room() -> None:
    harness = Harness(small_sizes(max_running=2, num_slots=4))
    for index in range(6):
        harness.submit([index, 1], max_tokens=9)
    assert not harness.manager.state.has_background
    ended_order(harness)
    assert harness.manager.state.counters.preemptions == 0


def test_background_requests_that_wait_take_no_place_in_the_queue_from_others() -> None:
    config = EngineConfig(max_queued_requests=4)
    harness = Harness(small_sizes(max_running=2, num_slots=4), config=config)
    for index in range(9):
        harness.submit([8, index], max_tokens=9, priority=100)
    harness.turn(2)
    assert harness.refused == {6, 7, 8}, "two may start, and four wait"
    for index in range(9):
        harness.submit([1, index], max_tokens=4)
    assert len(harness.refused) in (3 + 9 - 4, 3 + 9 - 5, 3 + 9 - 6)
    assert not harness.refused & {9, 10, 11, 12}
    ended_order(harness)
