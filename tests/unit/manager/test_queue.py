"""The queue and the pages are the only writers of their counters."""

from __future__ import annotations

import numpy as np
import pytest
from toka_engine.config import EngineConfig
from toka_engine.manager.pages import Pages
from toka_engine.manager.queue import Queue
from toka_engine.manager.requests import Request, Waiting
from toka_engine.manager.slots import Slots, State
from toka_engine.slot_parameters import Sampling

from tests.unit.manager.simulated import small_sizes


def waiting(first_stream: int, num_choices: int) -> Waiting:
    request = Request(
        first_stream=first_stream,
        num_choices=num_choices,
        first_choice=0,
        prompt_length=3,
        max_tokens=5,
        sampling=Sampling(),
        stop_ids=frozenset(),
        deliver_each=True,
        arrival=0,
    )
    return Waiting(request, dict.fromkeys(range(num_choices)), np.arange(3, dtype=np.int32))


def test_choices_are_counted_as_they_come_and_go() -> None:
    queue, first, second = Queue(lambda: 0.0), waiting(0, 3), waiting(3, 2)
    queue.add(first, at_front=False)
    queue.add(second, at_front=True)
    assert (list(queue.entries), queue.num_choices) == ([second, first], 5)
    queue.drop_choice(second, 0)
    queue.drop_choice(second, 1)
    assert (list(queue.entries), queue.num_choices) == ([first], 3)
    assert second not in queue
    queue.remove(first)
    assert (len(queue), queue.num_choices) == (0, 0)


def test_what_arrives_is_news_until_admission_has_looked() -> None:
    queue = Queue(lambda: 0.0)
    queue.settle()
    assert not queue.has_news
    queue.add(waiting(0, 1), at_front=False)
    assert queue.has_news


def test_counters_cannot_be_set_from_outside() -> None:
    for owner, name in (
        (Queue(lambda: 0.0), "num_choices"),
        (Slots(2, 4), "num_running"),
        (Queue(lambda: 0.0), "has_news"),
    ):
        with pytest.raises(AttributeError):
            setattr(owner, name, 1)


def test_pages_that_a_step_holds_are_free_when_it_is_back() -> None:
    sizes = small_sizes()
    pages = Pages(EngineConfig(), sizes)
    pages.hold(4, pages.take(2))
    pages.hold(6, pages.take(1))
    assert not pages.release_held(3)
    assert pages.release_held(5)
    assert pages.allocator.num_free == sizes.num_pages - 1
    assert pages.release_held(6)
    assert not pages.has_held


def test_a_slot_that_steps_in_flight_name_is_retired_until_the_last_one_is_back() -> None:
    slots = Slots(3, 4)
    first, second = slots.take(), slots.take()
    slots.last_steps[[first, second]] = 5, 2
    assert slots.retire(np.array([first, second], np.int32), completed_step=2).tolist() == [second]
    assert (slots.num_running, slots.has_retiring, slots.num_free) == (0, True, 1)
    assert slots.states[first] == State.RETIRING
    assert slots.take_retired(4).tolist() == []
    assert slots.take_retired(5).tolist() == [first]
    assert not slots.has_retiring
