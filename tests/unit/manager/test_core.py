"""The manager's core, driven with the simulated worker."""

from __future__ import annotations

import numpy as np
import psutil
import pytest
from toka_engine.config import EngineConfig
from toka_engine.manager.admission import MAX_SKIPS
from toka_engine.manager.busy import BusyTime
from toka_engine.manager.lifecycle import preempt_newest
from toka_engine.manager.requests import choice_seed
from toka_engine.manager.sizes import choose_sizes, engine_info
from toka_engine.manager.stopping import StopPredictor
from toka_engine.messages import FINISH_ERROR, FINISH_LENGTH, FINISH_STOP, WorkerReady

from tests.unit.manager.simulated import Harness, HashModel, small_sizes


def finish(harness: Harness) -> None:
    harness.run()
    harness.check_results()
    harness.check_nothing_held()


def test_one_stream_gets_the_tokens_of_the_reference() -> None:
    harness = Harness()
    harness.submit([1, 2, 3, 4, 5], max_tokens=9)
    finish(harness)


@pytest.mark.parametrize("length", [17, 20])
@pytest.mark.parametrize("deliver_each", [True, False])
def test_choices_of_one_prompt_prefill_it_once(length: int, deliver_each: bool) -> None:
    harness = Harness()
    harness.submit(list(range(length)), n=5, seed=7, max_tokens=10, deliver_each=deliver_each)
    num_prefilled = 0
    while harness.plan() or harness.sent:
        num_prefilled += harness.sent[0].prefill_tokens.size
        harness.return_one()
    harness.check_results()
    harness.check_nothing_held()
    assert num_prefilled == length
    assert len({tuple(result.tokens) for result in harness.results.values()}) == 5


def test_more_choices_than_slots_start_later_by_themselves_from_the_shared_pages() -> None:
    harness = Harness(small_sizes(num_pages=40))
    harness.submit(list(range(18)), n=20, seed=3, max_tokens=12)
    finish(harness)
    assert harness.manager.state.counters.prefix_hit_tokens >= 16


def test_single_tokens_of_many_choices_take_no_pages_of_their_own() -> None:
    harness = Harness(small_sizes(num_pages=5))
    harness.submit(list(range(18)), n=8, seed=3, max_tokens=1)
    finish(harness)
    assert harness.num_steps == 1


def test_chunks_of_a_long_prompt_run_beside_decode_rows() -> None:
    harness = Harness(small_sizes(max_tokens_per_forward=9))
    harness.submit([1, 2], max_tokens=30)
    harness.plan()
    harness.return_one()
    harness.submit(list(range(60)), max_tokens=3)
    harness.plan()
    step = harness.sent[-1]
    assert (step.decode_slots.size, step.prefill_tokens.size) == (1, 8)
    finish(harness)


def test_a_stop_token_is_counted_but_not_delivered() -> None:
    for deliver_each in (True, False):
        harness = Harness(model=HashModel(vocab_size=3))
        (stream,) = harness.submit([1, 2], max_tokens=40, stop_ids=(1,), deliver_each=deliver_each)
        finish(harness)
        result = harness.results[stream]
        assert result.reason == FINISH_STOP
        assert 1 not in result.tokens
        assert result.num_tokens == len(result.tokens) + 1


def test_more_stop_tokens_than_are_compared_at_once_all_stop() -> None:
    harness = Harness()
    stops = tuple(range(5, 40))
    (stream,) = harness.submit([1, 2], max_tokens=40, stop_ids=stops)
    finish(harness)
    assert harness.results[stream].reason == FINISH_STOP


def test_a_row_that_is_not_finite_ends_its_stream_only() -> None:
    harness = Harness(model=HashModel(failure_period=12))
    for first in range(8):
        harness.submit([first, 3], max_tokens=12)
    finish(harness)
    reasons = [result.reason for result in harness.results.values()]
    assert FINISH_ERROR in reasons
    assert FINISH_LENGTH in reasons


def test_logprobs_survive_preemption() -> None:
    harness = Harness(small_sizes(num_pages=12, max_request_tokens=48), config=EngineConfig(track_early_stopping=True))
    harness.manager.state.predictor.finished(np.full(32, 40, np.int32), np.full(32, 100, np.int32))
    for first in range(4):
        harness.submit([first, 3, 4], max_tokens=30, seed=first, num_logprobs=2 * (first % 2), deliver_each=first > 1)
    finish(harness)
    assert harness.manager.state.counters.preemptions > 0


@pytest.mark.parametrize("num_more", range(1, 7))
def test_what_a_preempted_stream_kept_goes_to_no_other_that_ends_with_it(num_more: int) -> None:
    harness = Harness()
    harness.submit([1, 2, 3], max_tokens=12 + num_more, num_logprobs=0)
    harness.submit([4, 5], max_tokens=12, num_logprobs=0, deliver_each=True)
    harness.turn(6)
    preempt_newest(harness.manager.state)
    finish(harness)
    assert harness.manager.state.counters.preemptions == 1


@pytest.mark.parametrize("num_steps", range(3, 10))
def test_top_logprobs_survive_several_preemptions_at_any_length(num_steps: int) -> None:
    """The last page is full, just begun, or has room; streams that end together ask for different numbers."""
    harness = Harness()
    harness.submit([1, 2, 3], max_tokens=40, num_logprobs=4)
    harness.submit([6, 7], max_tokens=40)
    harness.submit([4, 5], max_tokens=40, num_logprobs=2)
    for _ in range(3):
        harness.turn(num_steps)
        preempt_newest(harness.manager.state)
    finish(harness)
    assert harness.manager.state.counters.preemptions == 3


@pytest.mark.parametrize("num_more", range(1, 9))
def test_streams_that_end_together_are_told_only_the_top_logprobs_that_they_asked_for(num_more: int) -> None:
    harness = Harness()
    harness.submit([1, 2, 3], max_tokens=12, num_logprobs=1)
    harness.turn(4)
    harness.submit([4, 5], max_tokens=num_more, num_logprobs=3)
    finish(harness)


@pytest.mark.parametrize("max_pages_per_seq", [1, 7, 8, 9])
def test_requests_may_be_shorter_than_the_least_prefix_worth_a_group(max_pages_per_seq: int) -> None:
    config = EngineConfig(hydragen_min_prefix_len=32)
    most = 4 * max_pages_per_seq
    harness = Harness(small_sizes(max_pages_per_seq=max_pages_per_seq, max_request_tokens=most), config=config)
    harness.submit([1, 2], max_tokens=most - 2, n=5, seed=1)
    harness.submit(list(range(most - 1)), max_tokens=1)
    finish(harness)


def test_the_largest_request_finishes_alone_and_in_a_crowd() -> None:
    for crowd in (0, 6):
        harness = Harness(small_sizes(num_pages=16, max_request_tokens=64))
        for first in range(crowd):
            harness.submit([first, first, 1], max_tokens=50)
        harness.submit(list(range(30)), max_tokens=34)
        harness.submit(list(range(32)), max_tokens=32, n=3, seed=1)
        finish(harness)


def test_a_full_queue_refuses_and_forgets() -> None:
    harness = Harness(config=EngineConfig(max_queued_requests=2))
    assert len(harness.submit([1, 2], n=10)) == 10
    harness.plan()
    assert harness.submit([1, 2]) == []
    finish(harness)
    assert harness.submit([1, 2]) != []
    finish(harness)


def test_a_request_that_does_not_fit_is_passed_a_bounded_number_of_times() -> None:
    harness = Harness(small_sizes(num_pages=32, max_request_tokens=128))
    harness.submit([1, 2, 3], max_tokens=12)
    harness.plan()
    harness.return_one()
    (large,) = harness.submit([*range(40)] * 2 + [*range(36)], max_tokens=12)
    num_later = 0
    while large in harness.manager.state.where and harness.results[large].reason is None:
        while len(harness.manager.state.queue) < 4:
            harness.submit([7, num_later % 40], max_tokens=12)
            num_later += 1
        harness.plan()
        harness.return_one()
        entry = next(iter(harness.manager.state.queue.entries))
        assert entry.num_skipped <= MAX_SKIPS
    assert num_later > MAX_SKIPS / 2  # small ones did start meanwhile
    finish(harness)


def test_equal_prompts_that_arrive_together_are_prefilled_once() -> None:
    harness = Harness(small_sizes(max_tokens_per_forward=16))
    for _ in range(6):
        harness.submit(list(range(41)), max_tokens=4)
    finish(harness)
    assert harness.manager.state.counters.prefix_hit_tokens == 5 * 40


def test_an_answer_that_is_sent_back_is_found_in_the_prefix_tree() -> None:
    harness = Harness()
    (stream,) = harness.submit(list(range(10)), max_tokens=15)
    harness.run()
    conversation = [*range(10), *harness.results[stream].tokens, 1]
    harness.submit(conversation, max_tokens=5)
    finish(harness)
    assert harness.manager.state.counters.prefix_hit_tokens == 24


def test_without_a_prefix_cache_nothing_stays() -> None:
    harness = Harness(config=EngineConfig(use_prefix_cache=False))
    for _ in range(3):
        harness.submit(list(range(18)), n=3, max_tokens=6, seed=1)
    finish(harness)
    assert harness.manager.state.pages.allocator.num_free == harness.sizes.num_pages
    assert harness.manager.state.counters.prefix_hit_tokens == 0


def test_each_choice_has_a_seed_of_its_own() -> None:
    seeds = [choice_seed(seed, choice) for seed in (0, 1, (1 << 63) - 1) for choice in range(100)]
    assert len(set(seeds)) == 300
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert choice_seed(-1, 5) == -1


def test_a_part_of_a_request_draws_as_its_choices_would_in_the_whole() -> None:
    whole, parts = Harness(), Harness()
    prompt = list(range(9))
    whole.submit(prompt, n=5, max_tokens=12, seed=3)
    finish(whole)
    parts.submit(prompt, n=2, max_tokens=12, seed=3)
    parts.submit(prompt, n=3, max_tokens=12, seed=3, first_choice=2)
    finish(parts)
    assert [parts.results[stream].tokens for stream in range(5)] == [
        whole.results[stream].tokens for stream in range(5)
    ]


def test_the_server_hears_of_each_admitted_prompt_and_of_what_was_cached_of_it() -> None:
    harness = Harness(small_sizes(num_slots=3, max_running=3))
    shared = list(range(20))
    (first,) = harness.submit(shared, max_tokens=3)
    assert harness.manager.take_started() is None
    harness.plan()
    assert started(harness) == {first: 0}
    finish(harness)
    (second, *_) = harness.submit([*shared[:12], 1, 2, 3, 4, 5], n=2, max_tokens=3)
    (third,) = harness.submit(shared, max_tokens=3)
    harness.run()
    assert started(harness) == {second: 12, third: 16}


def started(harness: Harness) -> dict[int, int]:
    message = harness.manager.take_started()
    assert message is not None
    return dict(zip(message.streams.tolist(), message.num_cached.tolist(), strict=True))


def test_predictions_follow_what_finished_and_turn_careful_after_a_preemption() -> None:
    predictor = StopPredictor(is_enabled=True)
    limits = np.asarray([100, 100], np.int32)
    planned = np.asarray([1, 60], np.int32)
    assert predictor.predict_remaining(planned, limits).tolist() == [99, 40]
    predictor.finished(np.full(50, 20, np.int32), np.full(50, 100, np.int32))
    predictor.finished(np.full(50, 80, np.int32), np.full(50, 100, np.int32))
    assert predictor.predict_remaining(planned, limits).tolist() == [49, 20]
    predictor.preempted()
    assert predictor.predict_remaining(planned, limits).tolist() == [62, 25]
    assert StopPredictor(is_enabled=False).predict_remaining(planned, limits).tolist() == [99, 40]


def test_limits_follow_from_the_model_the_cache_and_the_settings() -> None:
    ready = WorkerReady(
        vocab_size=10, max_positions=2048, num_pages=64, page_size=16, max_seqs=256,
        max_tokens_per_forward=128, max_pages_per_seq=128, device="cpu", dtype="float32", num_layers=1,
        num_heads=1, num_kv_heads=1, head_dim=8,
    )  # fmt: skip
    assert choose_sizes(EngineConfig(), ready).max_request_tokens == 64 * 16
    sizes = choose_sizes(EngineConfig(max_num_tokens_per_request=100), ready)
    assert sizes.max_request_tokens == 100
    assert sizes.max_running == 112  # decode rows leave an eighth of the forward to prefill
    assert engine_info(sizes, ready).max_streams == 112


def test_tables_take_no_memory_after_the_start() -> None:
    process = psutil.Process()
    harness = Harness(small_sizes(num_slots=1024, max_pages_per_seq=8192, num_pages=1 << 18))
    state = harness.manager.state
    before = process.memory_info().rss
    tables = [state.slots.table, state.pages.tokens, state.pages.logprobs, state.pages.allocator.refs]
    for table in tables:
        table.fill(0)
    assert sum(table.nbytes for table in tables) > 40 << 20
    assert process.memory_info().rss - before < 4 << 20


def test_stats_add_up() -> None:
    harness = Harness()
    harness.submit(list(range(18)), n=3, max_tokens=6, seed=1)
    harness.plan()
    running = harness.manager.stats(1.5, 0.5)
    assert (running.running, running.waiting, running.kv_pages_used) == (3, 0, 7)
    harness.run()
    stats = harness.manager.stats(2.5, 1.25)
    assert (stats.running, stats.waiting, stats.kv_pages_used) == (0, 0, 0)
    assert stats.output_tokens_total == 18
    assert stats.prompt_tokens_total == 18
    assert stats.steps_total == harness.num_steps
    assert stats.kv_pages_cached == 4
    assert (stats.manager_cpu_s_total, stats.step_busy_s_total) == (2.5, 1.25)


def test_time_in_which_steps_overlap_counts_once_and_idle_time_not_at_all() -> None:
    busy = BusyTime()
    for end_s, wall_s in ((3.0, 2.0), (4.0, 2.5), (5.0, 3.0), (9.0, 1.0)):  # 1-3, 1.5-4, 2-5, 8-9
        busy.add_step(end_s, wall_s)
    assert busy.total_s == 5.0


def test_prompts_have_a_step_to_themselves_until_a_stream_runs() -> None:
    sizes = small_sizes(num_pages=24, num_slots=32, max_running=32, max_prefill_tokens=8, max_lone_prefill_tokens=20)
    harness = Harness(sizes)
    for first in range(6):
        harness.submit([first] * 10, max_tokens=8, seed=first)
    steps = []
    while harness.plan() or harness.sent:
        steps += [step for step in harness.sent if step.number >= len(steps)]
        harness.return_one()
    prompts = [(step.decode_slots.size > 0, int(step.prefill_lengths.sum())) for step in steps]
    assert prompts[0] == (False, 20)
    assert max(tokens for has_rows, tokens in prompts if has_rows) == 8
    harness.check_results()


def test_where_pages_are_short_at_most_every_second_step_admits() -> None:
    forward = {"max_tokens_per_forward": 64, "max_prefill_tokens": 64, "max_lone_prefill_tokens": 64}
    sizes = small_sizes(num_pages=24, num_slots=32, max_running=32, **forward)
    harness = Harness(sizes)
    for first in range(40):
        harness.submit([first] * 4, max_tokens=5 + first % 9, seed=first)
    admitting = []
    while harness.plan() or harness.sent:
        admitting += [step.number for step in harness.sent if len(step.new) and step.number not in admitting]
        harness.return_one()
    assert len(admitting) > 2
    assert min(np.diff(admitting)) >= 2
    harness.check_results()
    harness.check_nothing_held()
