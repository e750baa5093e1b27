"""The manager's core, driven with the simulated worker."""

from __future__ import annotations

from tests.unit.manager.simulated import Harness, small_sizes


def test_one_stream_gets_the_tokens_of_the_reference() -> None:
    harness = Harness()
    harness.submit([1, 2, 3, 4, 5], max_tokens=9)
    harness.run()
    harness.check_results()
    harness.check_nothing_held()


def test_choices_of_one_prompt_prefill_it_once() -> None:
    harness = Harness()
    harness.submit(list(range(18)), n=5, seed=7, max_tokens=10, deliver_each=True)
    harness.run()
    harness.check_results()
    harness.check_nothing_held()
    assert harness.worker.sizes.num_slots == 8


def test_more_choices_than_slots_start_later_by_themselves() -> None:
    harness = Harness(small_sizes(num_pages=20))
    harness.submit(list(range(18)), n=20, seed=3, max_tokens=12)
    harness.submit(list(range(30)), n=2, seed=4, max_tokens=12)
    harness.run()
    harness.check_results()
    harness.check_nothing_held()
