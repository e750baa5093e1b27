"""Lanes of decode rows: steps in flight have no row in common, and every row has its turn."""

from __future__ import annotations

import random

import numpy as np
import pytest
from toka_engine.config import EngineConfig
from toka_engine.manager.lanes import UNEVEN_SHARE, Lanes
from toka_engine.messages import Step

from tests.unit.manager.simulated import Harness, small_sizes


def make_harness(num_lanes: int, pp_size: int = 1, **sizes: int) -> Harness:
    config = EngineConfig(
        hydragen_min_group_size=2,
        hydragen_min_prefix_len=4,
        scheduling_steps_ahead=num_lanes + 1,
        pp_size=pp_size,
    )
    return Harness(small_sizes(**{"num_pages": 160, "num_lanes": num_lanes, **sizes}), config=config)


def run_until_all_decode(harness: Harness, count: int) -> None:
    lanes = harness.manager.state.lanes
    assert lanes is not None
    while sum(lane.slots.size for lane in lanes.every) < count:
        harness.plan()
        harness.return_one()


def slots_of(steps: list[Step]) -> list[set[int]]:
    return [set(step.decode_slots.tolist()) for step in steps]


@pytest.mark.parametrize("num_lanes", [2, 3])
def test_each_step_has_the_rows_of_one_lane_and_all_rows_have_equal_turns(num_lanes: int) -> None:
    harness = make_harness(num_lanes)
    for first in range(6):
        harness.submit([first, first + 1], max_tokens=60)
    run_until_all_decode(harness, 6)
    harness.plan()
    in_flight = slots_of(list(harness.sent)[-num_lanes:])
    assert [len(slots) for slots in in_flight] == [6 // num_lanes] * num_lanes
    assert len(set().union(*in_flight)) == 6, "a row is in two steps of one round"
    harness.run()
    harness.check_results()
    harness.check_nothing_held()


def test_one_stream_has_two_steps_in_flight_however_many_lanes_there_are() -> None:
    """More would keep a request that comes meanwhile waiting behind steps that only wait for each other."""
    harness = make_harness(4)
    harness.submit([1, 2, 3], max_tokens=30)
    harness.plan()
    harness.return_one()
    harness.plan()
    assert len(harness.sent) == 2
    harness.run()
    harness.check_results()


def test_chunks_of_a_long_prompt_fill_all_steps_in_flight() -> None:
    harness = make_harness(3, max_tokens_per_forward=8, max_prefill_tokens=8, max_lone_prefill_tokens=8)
    harness.submit(list(range(40)), max_tokens=4)
    harness.plan()
    assert [step.prefill_lengths.tolist() for step in harness.sent] == [[8]] * 4


def test_choices_of_a_prompt_stay_together_as_a_group_while_that_is_even() -> None:
    harness = make_harness(2, num_slots=20, max_running=20, num_pages=400)
    for first in range(16):
        harness.submit([first], max_tokens=40)
    run_until_all_decode(harness, 16)
    first = harness.submit([*range(10, 19)], n=2, max_tokens=30)
    second = harness.submit([*range(20, 29)], n=2, max_tokens=30)
    run_until_all_decode(harness, 20)
    state = harness.manager.state
    assert state.lanes is not None
    streams = [set(state.slots.stream_ids[lane.slots].tolist()) for lane in state.lanes.every]
    assert max(map(len, streams)) <= 20 / 2 * (1 + 1 / UNEVEN_SHARE)
    assert all(set(choices) <= streams[0] or set(choices) <= streams[1] for choices in (first, second))
    harness.run()
    harness.check_results()
    assert harness.worker.num_shared_rows > 0


def test_few_rows_are_in_no_more_lanes_than_there_are_stages() -> None:
    """Each lane's step reads the weights once more."""
    harness = make_harness(3, pp_size=2, num_few_rows=4)
    lanes = harness.manager.state.lanes
    assert lanes is not None
    sizes = []
    for count in range(1, 8):
        harness.submit([count, 1], max_tokens=60)
        run_until_all_decode(harness, count)
        sizes.append([lane.slots.size for lane in lanes.every])
    assert [sorted(each[:2]) for each in sizes[:4]] == [[0, 1], [1, 1], [1, 2], [2, 2]]
    assert [each[2] for each in sizes] == [0, 0, 0, 0, 1, 2, 2]
    harness.run()
    harness.check_results()
    harness.check_nothing_held()


def test_rows_that_have_become_few_are_gathered_in_as_many_lanes_as_there_are_stages() -> None:
    harness = make_harness(3, pp_size=2, num_few_rows=4, num_slots=12, max_running=12)
    lanes = harness.manager.state.lanes
    assert lanes is not None
    for first in range(9):
        harness.submit([first, 1], max_tokens=20 + 10 * first)
    run_until_all_decode(harness, 9)
    assert [lane.slots.size for lane in lanes.every] == [3, 3, 3]
    sizes = []
    while lanes.num_rows > 2:
        harness.plan()
        harness.return_one()
        sizes.append([lane.slots.size for lane in lanes.every])
    few = [each for each in sizes if sum(each) == 3]
    assert few[-1] in ([2, 1, 0], [1, 2, 0])
    assert any(each[2] for each in sizes if sum(each) > 3)
    harness.run()
    harness.check_results()
    harness.check_nothing_held()


@pytest.mark.parametrize("prompt_size", [5, 40])
def test_with_prompts_no_step_needs_tokens_that_are_still_to_come_from_the_last_stage(prompt_size: int) -> None:
    """Its rows would keep the first stage waiting for the last one, and stages would work one at a time."""
    harness = make_harness(3, pp_size=2, num_slots=32, max_running=32, max_tokens_per_forward=20)
    chance = random.Random(1)
    for first in range(60):
        harness.submit([first] * prompt_size, max_tokens=chance.randint(5, 40))
    seen: list[Step] = []
    while harness.manager.state.queue:
        harness.plan()
        seen += [step for step in harness.sent if not seen or step.number > seen[-1].number]
        harness.return_one()
    mixed = [step for step in seen if step.prefill_slots.size]
    assert len(mixed) > 20
    waits = [step.number for step in seen[4:] if step.after > step.number - 2]
    assert len(waits) <= len(seen) // 20, waits
    harness.run()
    harness.check_results()


def test_many_choices_of_one_prompt_are_spread() -> None:
    harness = make_harness(3, num_slots=16, max_running=16)
    harness.submit([1, 2, 3, 4, 5], n=10, max_tokens=20)
    run_until_all_decode(harness, 10)
    lanes = harness.manager.state.lanes
    assert lanes is not None
    assert sorted(lane.slots.size for lane in lanes.every) == [2, 4, 4]
    harness.run()
    harness.check_results()


def reuse_a_slot(harness: Harness) -> None:
    """A stream leaves when no step names it, and another takes its slot before its lane has its turn."""
    for first in range(6):
        harness.submit([first, 1], max_tokens=40)
    run_until_all_decode(harness, 6)
    while harness.sent:
        harness.return_one()
    state = harness.manager.state
    assert state.lanes is not None
    first, *others = state.lanes.in_turn()
    harness.cancel(int(state.slots.stream_ids[first.slots[0]]), int(state.slots.stream_ids[others[-1].slots[0]]))
    harness.submit([7, 1], max_tokens=40)
    harness.submit([8, 1], max_tokens=40)
    harness.plan()
    rows = state.lanes.list_rows().tolist()
    assert len(set(rows)) == len(rows), "a slot is in two lanes, or twice in one"
    harness.run()
    harness.check_results()
    harness.check_nothing_held()


def test_a_slot_that_changes_hands_is_in_one_lane() -> None:
    reuse_a_slot(make_harness(3, num_slots=6, max_running=6))


def test_without_the_drop_at_each_step_a_slot_would_be_in_two_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lanes, "drop_ended", lambda self, slots: None)
    with pytest.raises(AssertionError):
        reuse_a_slot(make_harness(3, num_slots=6, max_running=6))


def test_lanes_that_wait_for_pages_preempt_and_starve_nobody() -> None:
    harness = make_harness(3, num_pages=16, max_request_tokens=60)
    harness.manager.state.predictor.finished(np.full(32, 40, np.int32), np.full(32, 100, np.int32))
    for first in range(12):
        harness.submit([first, 2, 3], n=1 + first % 2, max_tokens=40)
    harness.run()
    harness.check_results()
    harness.check_nothing_held()
    assert harness.manager.state.counters.preemptions > 0
