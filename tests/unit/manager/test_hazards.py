"""Running ahead keeps its promises. Each guard is also taken away, to show that the test sees it missing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from toka_engine.config import EngineConfig
from toka_engine.manager import admission, lifecycle, receiving, scheduler
from toka_engine.manager.allocator import Allocator
from toka_engine.manager.state import ManagerState
from toka_engine.messages import Submit
from toka_engine.slot_parameters import Sampling

from tests.unit.manager.simulated import Harness, HashModel, reference, small_sizes

Patch = pytest.MonkeyPatch


def stopping_request(model: HashModel, prompt: list[int], at: int) -> tuple[int, ...]:
    """A stop token that ends the stream of `prompt` at its `at`-th token and not before."""
    probe = Submit(0, 1, np.asarray(prompt, np.int32), 40, Sampling(), (), False)
    tokens = reference(model, probe, 0).tokens
    return next((token,) for index, token in enumerate(tokens) if index >= at and token not in tokens[:index])


def overrun(harness: Harness) -> None:
    """Streams that stop while two more steps are on their way, with others waiting for their slots and
    pages."""
    harness.model = harness.worker.model = HashModel(vocab_size=400)
    for first in range(12):
        prompt = [first, first + 1, first + 2]
        harness.submit(prompt, max_tokens=40, stop_ids=stopping_request(harness.model, prompt, 4), deliver_each=True)
    harness.run()
    harness.check_results()
    harness.check_nothing_held()


def three_ahead() -> Harness:
    return Harness(small_sizes(num_slots=3, max_running=3, num_pages=34), config=EngineConfig(scheduling_steps_ahead=3))


def test_tokens_of_overrun_steps_are_dropped() -> None:
    overrun(three_ahead())


def test_without_generations_a_stale_token_reaches_a_stream_that_ended(monkeypatch: Patch) -> None:
    harness = three_ahead()
    receive = receiving.receive_tokens

    def without_guard(state: ManagerState, tokens: object) -> object:
        flight = state.in_flight[0]
        flight.generations[:] = state.slots.generations[flight.slots]
        return receive(state, tokens)  # type: ignore[arg-type]

    monkeypatch.setattr("toka_engine.manager.core.receive_tokens", without_guard)
    with pytest.raises(AssertionError):
        overrun(harness)


def test_without_retirement_a_slot_or_page_is_reused_under_a_step_on_its_way(monkeypatch: Patch) -> None:
    harness = three_ahead()
    end = lifecycle.end_slots

    def without_guard(state: ManagerState, ended: np.ndarray) -> None:  # type: ignore[type-arg]
        state.slots.last_steps[ended] = 0
        end(state, ended)

    monkeypatch.setattr(receiving, "end_slots", without_guard)
    with pytest.raises(AssertionError, match=r"still names it|still writes this page"):
        overrun(harness)


def same_prompts(harness: Harness) -> None:
    for _ in range(3):
        harness.submit(list(range(30)), max_tokens=5)
    harness.run()
    harness.check_results()
    harness.check_nothing_held()


def test_equal_prompts_share_pages_only_from_the_next_step_on() -> None:
    harness = Harness(small_sizes(max_tokens_per_forward=100))
    same_prompts(harness)
    assert harness.manager.state.counters.prefix_hit_tokens == 2 * 28


def test_pages_entered_before_their_step_would_be_read_before_they_are_written(monkeypatch: Patch) -> None:
    start = admission.start_entry

    def without_guard(state: ManagerState, *arguments: object) -> None:
        start(state, *arguments)  # type: ignore[arg-type]
        prefill = state.prefills[-1]
        num_full = prefill.tokens.size // state.sizes.page_size
        state.pages.tree.insert_path(state.slots.table[prefill.slot, :num_full], 0, 1)

    monkeypatch.setattr(admission, "start_entry", without_guard)
    with pytest.raises(AssertionError, match="a read of"):
        same_prompts(Harness(small_sizes(max_tokens_per_forward=12)))


def cancel(harness: Harness, stream: int) -> None:
    harness.cancel(stream)


def preempt(harness: Harness, stream: int) -> None:
    """Preempts the newest streams, as the shortage of pages does."""
    state = harness.manager.state
    slot = state.where[stream]
    assert isinstance(slot, int)
    state.slots.orders[slot] = 1 << 60
    assert lifecycle.preempt_newest(state) is not None
    assert not isinstance(state.where[stream], int)


Lose = Callable[[Harness, int], None]


def lose_the_owner(harness: Harness, lose: Lose) -> None:
    """The owner of a prompt leaves while another reads its pages and others want pages."""
    (owner,) = harness.submit(list(range(20)), max_tokens=30)
    harness.plan()
    harness.return_one()
    (reader,) = harness.submit([*range(20), 7, 8], max_tokens=30, deliver_each=True)
    harness.plan()
    state = harness.manager.state
    table = state.slots.table
    assert (table[state.where[reader], :5] == table[state.where[owner], :5]).all()
    lose(harness, owner)
    for first in range(3):
        harness.submit(list(range(first + 5, first + 25)), max_tokens=20)
    harness.run()
    harness.check_results()
    harness.check_nothing_held()


@pytest.mark.parametrize("lose", [cancel, preempt])
def test_pages_of_an_owner_that_left_stay_for_those_who_matched_them(lose: Lose) -> None:
    lose_the_owner(Harness(small_sizes(num_pages=24)), lose)


@pytest.mark.parametrize("lose", [cancel, preempt])
def test_without_references_the_matched_pages_would_be_lost(monkeypatch: Patch, lose: Lose) -> None:
    def without_guard(self: Allocator, pages: np.ndarray, times: int = 1) -> None:  # type: ignore[type-arg]
        self.refs[pages] = np.maximum(self.refs[pages], 1)

    monkeypatch.setattr(Allocator, "retain", without_guard)
    with pytest.raises(AssertionError, match=r"a read of|is not in the tree"):
        lose_the_owner(Harness(small_sizes(num_pages=24)), lose)


def lose_the_leader(harness: Harness) -> None:
    """The leader is cancelled between the sampling of its siblings and the copy of the prompt's last page."""
    harness.config = harness.manager.state.config
    streams = harness.submit(list(range(18)), n=3, max_tokens=9, seed=2)
    harness.plan()
    assert harness.manager.state.copies
    harness.cancel(streams[0])
    harness.return_one()
    assert streams[0] not in harness.manager.state.where
    for first in range(3):
        harness.submit(list(range(first + 5, first + 25)), max_tokens=20)
    harness.run()
    harness.check_results()
    harness.check_nothing_held()


def one_ahead() -> Harness:
    return Harness(small_sizes(num_pages=20), config=EngineConfig(scheduling_steps_ahead=1))


def test_the_prompts_last_page_is_copied_although_its_owner_is_gone() -> None:
    lose_the_leader(one_ahead())


def test_without_its_own_reference_the_last_page_would_be_reused_before_its_copy(monkeypatch: Patch) -> None:
    schedule = scheduler.schedule_copies

    def without_guard(state: ManagerState, *arguments: object) -> None:
        schedule(state, *arguments)  # type: ignore[arg-type]
        state.pages.allocator.release(np.asarray([state.copies[-1].source], np.int32))

    monkeypatch.setattr(scheduler, "schedule_copies", without_guard)
    with pytest.raises(AssertionError):
        lose_the_leader(one_ahead())


def test_a_cancel_in_the_tick_of_arrival_sends_nothing_and_holds_nothing() -> None:
    harness = Harness()
    streams = harness.submit([1, 2, 3], n=3)
    harness.cancel(*streams)
    assert harness.plan() == 0
    harness.check_nothing_held()


def test_a_late_cancel_ends_delivery_at_once_and_frees_everything_within_two_steps() -> None:
    harness = Harness(small_sizes(num_pages=20))
    streams = harness.submit(list(range(18)), n=2, max_tokens=40, deliver_each=True)
    for _ in range(8):
        harness.plan()
        harness.return_one()
    harness.plan()
    assert len(harness.sent) == 2
    harness.cancel(*streams)
    assert harness.plan() == 0
    harness.return_one()
    harness.return_one()
    harness.check_nothing_held()
    harness.check_results()


def leave_with_tokens_on_their_way(harness: Harness) -> None:
    """A stream is cancelled while steps on their way fill a page whose tokens the manager will never learn; another
    asks for what that page seems to hold."""
    (stream,) = harness.submit([1, 2, 3, 4, 5], max_tokens=30, deliver_each=True)
    while not harness.results[stream].tokens:
        harness.plan()
        harness.return_one()
    harness.plan()
    assert len(harness.sent) == 3  # they write the rest of the second page
    state = harness.manager.state
    page = state.slots.table[state.where[stream], 1]
    seeming = state.pages.tokens[page].tolist()
    harness.cancel(stream)
    while harness.sent:
        harness.return_one()
    assert harness.worker.writers[page, 3, 0] > 0
    harness.submit([1, 2, 3, 4, *seeming, 6], max_tokens=10)
    harness.run()
    harness.check_results()
    harness.check_nothing_held()
    assert seeming != [5, *reference(harness.model, harness.submits[stream][0], 0).tokens[:3]]


def test_a_page_that_a_queued_step_filled_for_a_stream_that_left_is_not_found_again() -> None:
    leave_with_tokens_on_their_way(three_ahead())


def test_without_counting_what_came_back_that_page_would_be_found_by_what_it_held_before(monkeypatch: Patch) -> None:
    release = lifecycle.release_slots

    def without_guard(state: ManagerState, released: np.ndarray) -> None:  # type: ignore[type-arg]
        slots = state.slots
        slots.num_received[released] = slots.lengths[released] - slots.prompt_lengths[released]
        release(state, released)

    monkeypatch.setattr(lifecycle, "release_slots", without_guard)
    with pytest.raises(AssertionError):
        leave_with_tokens_on_their_way(three_ahead())


def leave_in_mid_prefill(harness: Harness) -> None:
    """A stream is cancelled while a chunk of its prompt is on its way, and another waits for its slot."""
    (stream,) = harness.submit(list(range(60)), max_tokens=5)
    harness.plan()
    assert harness.manager.state.prefills
    harness.cancel(stream)
    harness.submit([7, 8, 9], max_tokens=5)
    harness.plan()
    harness.run()
    harness.check_results()
    harness.check_nothing_held()


def one_slot() -> Harness:
    return Harness(small_sizes(num_slots=1, max_running=1, num_pages=20))


def test_a_slot_is_kept_until_the_chunk_that_fills_it_is_back() -> None:
    leave_in_mid_prefill(one_slot())


def leave_when_sampled_for(harness: Harness) -> None:
    """Choices are cancelled while the step that samples their first tokens is on its way."""
    streams = harness.submit(list(range(18)), n=3, max_tokens=9, seed=2)
    harness.plan(1)
    assert harness.sent[-1].fanout_slots.size == 3
    harness.cancel(*streams)
    harness.submit([7, 8, 9], n=3, max_tokens=5)
    harness.plan()
    harness.run()
    harness.check_results()
    harness.check_nothing_held()


def three_slots() -> Harness:
    return Harness(small_sizes(num_slots=3, max_running=3))


def test_slots_are_kept_until_the_step_that_samples_for_them_is_back() -> None:
    leave_when_sampled_for(three_slots())


@pytest.mark.parametrize("play", [leave_in_mid_prefill, leave_when_sampled_for])
def test_without_the_number_of_their_last_step_such_slots_are_reused_too_early(
    monkeypatch: Patch, play: Callable[[Harness], None]
) -> None:
    end = lifecycle.end_slots

    def without_guard(state: ManagerState, ended: np.ndarray) -> None:  # type: ignore[type-arg]
        state.slots.last_steps[ended] = 0
        end(state, ended)

    monkeypatch.setattr(lifecycle, "end_slots", without_guard)
    with pytest.raises(AssertionError, match="still names it"):
        play(one_slot() if play is leave_in_mid_prefill else three_slots())


def test_the_page_of_a_choice_that_left_before_its_copy_is_not_copied_to() -> None:
    harness = one_ahead()
    streams = harness.submit(list(range(18)), n=3, max_tokens=9, seed=2)
    harness.plan()
    harness.cancel(streams[1])
    harness.return_one()
    harness.plan()
    assert harness.sent[-1].copy_to.size == 1
    harness.run()
    harness.check_results()
    harness.check_nothing_held()


def copy_on_its_way(harness: Harness) -> None:
    """The leader is gone when the step that copies the prompt's last page is sent, and another wants pages."""
    streams = harness.submit(list(range(18)), n=3, max_tokens=9, seed=2)
    harness.plan(1)
    harness.cancel(streams[0])
    harness.return_one()
    harness.plan(1)
    assert harness.sent[-1].copy_from.size == 2
    harness.submit(list(range(12, 32)), max_tokens=5)
    assert harness.plan() == 1
    assert harness.sent[-1].prefill_tokens.size == 20
    harness.run()
    harness.check_results()
    harness.check_nothing_held()


def test_the_prompts_last_page_stays_until_its_copy_is_back() -> None:
    copy_on_its_way(Harness())


def test_without_holding_it_the_last_page_would_be_given_away_under_its_copy(monkeypatch: Patch) -> None:
    emit = scheduler.emit_copies

    def without_guard(state: ManagerState, *arguments: object) -> None:
        emit(state, *arguments)  # type: ignore[arg-type]
        state.pages.release_held(state.next_step)

    monkeypatch.setattr(scheduler, "emit_copies", without_guard)
    with pytest.raises(AssertionError, match="still copies this page"):
        copy_on_its_way(Harness())


def storm(harness: Harness) -> int:
    """Outputs far longer than any that finished before, in a cache that holds few of them; return
    preemptions."""
    predictor = harness.manager.state.predictor
    predictor.finished(np.full(64, 30, np.int32), np.full(64, 100, np.int32))
    for first in range(8):
        harness.submit([first, 1, 2], max_tokens=80)
    harness.run()
    harness.check_results()
    harness.check_nothing_held()
    return harness.manager.state.counters.preemptions


def test_a_prediction_too_low_costs_few_preemptions(monkeypatch: Patch) -> None:
    guarded = storm(Harness(small_sizes(num_pages=30)))
    monkeypatch.setattr("toka_engine.manager.stopping.StopPredictor.preempted", lambda self: None)
    unguarded = storm(Harness(small_sizes(num_pages=30)))
    assert 0 < guarded < unguarded


@pytest.mark.parametrize("num_ahead", [1, 2, 3])
def test_any_number_of_steps_ahead_gives_the_same_tokens(num_ahead: int) -> None:
    harness = Harness(small_sizes(num_pages=24), config=EngineConfig(scheduling_steps_ahead=num_ahead))
    for first in range(6):
        harness.submit(list(range(first, first + 9)), n=2, max_tokens=20, seed=first, stop_ids=(1, 2, 3))
    harness.run()
    harness.check_results()
    harness.check_nothing_held()
