"""Random requests, cancels, stops and delays on tiny caches: outputs equal the reference and nothing stays
held."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from toka_engine.config import EngineConfig
from toka_engine.messages import LogitEdits

from tests.unit.manager.simulated import Harness, HashModel, small_sizes


def make_edits(number: int) -> LogitEdits:
    return LogitEdits(np.asarray([number], np.int32), np.asarray([1.0], np.float32))


def play(harness: Harness, rng: np.random.Generator, num_requests: int, cancel_rate: float) -> None:
    """Submit at random moments, cancel at random moments, return tokens at random delays."""
    most = harness.sizes.max_request_tokens
    prefixes = [rng.integers(0, 40, rng.integers(1, 24)).tolist() for _ in range(3)]
    live: list[int] = []
    left = num_requests
    while left or harness.sent or harness.manager.has_work:
        while left and rng.random() < 0.5:
            left -= 1
            prompt = prefixes[rng.integers(3)] + rng.integers(0, 40, rng.integers(0, 12)).tolist()
            prompt = prompt[: most - 1]
            live += harness.submit(
                prompt,
                n=int(rng.choice([1, 1, 1, 2, 5])),
                max_tokens=int(rng.integers(1, most - len(prompt) + 1)),
                seed=int(rng.choice([-1, 3, 1 << 62])),
                stop_ids=tuple(rng.integers(0, 40, rng.choice([0, 1, 10])).tolist()),
                deliver_each=bool(rng.random() < 0.5),
                num_logprobs=int(rng.choice([-1, 0, 2])),
                edits=make_edits(int(rng.integers(1, 9))) if rng.random() < 0.3 else None,
                delivers_stop=bool(rng.random() < 0.3),
                prompt_logprobs=int(rng.choice([-1, -1, 0, 2])),
                priority=int(rng.choice([-1, 0, 0, 10, 100])),
                timeout_s=float(rng.choice([0.0, 0.0, 0.5, 100.0])),
                frequency_penalty=float(rng.choice([0.0, 0.0, 0.5])),
                repetition_penalty=float(rng.choice([1.0, 1.0, 1.25])),
            )
        if live and rng.random() < cancel_rate:
            harness.cancel(*rng.choice(live, min(len(live), 3)).tolist())
        harness.now += float(rng.choice([0.0, 0.1, 400.0], p=[0.5, 0.4, 0.1]))
        harness.plan()
        for _ in range(int(rng.integers(0, len(harness.sent) + 1))):
            harness.return_one()
        assert harness.num_steps < 20_000, "no progress"


@settings(max_examples=60, deadline=None)
@given(
    random_seed=st.integers(0, 1 << 32),
    num_pages=st.sampled_from([8, 12, 20, 64]),
    steps_ahead=st.integers(1, 7),
    step_s=st.sampled_from([0.0, 0.05]),
    max_tokens_per_forward=st.sampled_from([9, 24, 64]),
    max_prefill_tokens=st.sampled_from([3, 24, 64]),
    max_lone_prefill_tokens=st.sampled_from([3, 24, 64]),
    use_prefix_cache=st.booleans(),
    use_hydragen=st.booleans(),
    cancel_rate=st.sampled_from([0.0, 0.1]),
    failure_period=st.sampled_from([0, 60]),
    num_lanes=st.sampled_from([1, 1, 2, 3, 5]),
    num_stages=st.sampled_from([1, 2, 4]),
    num_few_rows=st.sampled_from([0, 3, 8]),
)
def test_every_stream_gets_the_tokens_of_the_reference_and_nothing_stays_held(
    random_seed: int,
    num_pages: int,
    steps_ahead: int,
    step_s: float,
    max_tokens_per_forward: int,
    max_prefill_tokens: int,
    max_lone_prefill_tokens: int,
    use_prefix_cache: bool,
    use_hydragen: bool,
    cancel_rate: float,
    failure_period: int,
    num_lanes: int,
    num_stages: int,
    num_few_rows: int,
) -> None:
    sizes = small_sizes(
        num_pages=num_pages,
        max_request_tokens=min(60, num_pages * 4),
        max_tokens_per_forward=max_tokens_per_forward,
        max_prefill_tokens=max_prefill_tokens,
        max_lone_prefill_tokens=max_lone_prefill_tokens,
        num_lanes=num_lanes,
        num_few_rows=num_few_rows,
    )
    config = EngineConfig(
        pp_size=num_stages,
        scheduling_steps_ahead=steps_ahead,
        use_prefix_cache=use_prefix_cache,
        use_hydragen=use_hydragen,
        hydragen_min_group_size=2,
        hydragen_min_prefix_len=4,
    )
    harness = Harness(sizes, HashModel(failure_period=failure_period), config)
    if step_s:
        harness.seconds_of = lambda step: step_s + step_s / 8 * (step.decode_slots.size + step.prefill_tokens.size)
    play(harness, np.random.default_rng(random_seed), 12, cancel_rate)
    harness.check_results()
    harness.check_nothing_held()
