"""The vectorised forecast against a step-by-step simulation, alone and on the state of a running manager."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from toka_engine.manager.admission import measure_running, measure_streams
from toka_engine.manager.simulation import Arrival, Forecast, Load

from tests.unit.manager.simulated import Harness, small_sizes

PAGE = 4


def gold_peak(streams: list[tuple[int, int, set[int]]], page_size: int) -> int:
    """streams: (length, remaining, pages held now). Run them step by step; return the most pages ever in
    use."""
    peak, fresh = 0, 10**9
    alive = [(length, remaining, set(pages)) for length, remaining, pages in streams]
    time = 0
    while alive:
        for length, _, pages in alive:
            while len(pages) < -(-(length + time) // page_size):
                pages.add(fresh)
                fresh += 1
        peak = max(peak, len(set().union(*(pages for _, _, pages in alive))))
        alive = [stream for stream in alive if stream[1] > time]
        time += 1
    return peak


def load_of(streams: list[tuple[int, int, set[int]]]) -> Load:
    holders: dict[int, list[int]] = {}
    for _, remaining, pages in streams:
        for page in pages:
            holders.setdefault(page, []).append(remaining)
    shared = [max(ends) for ends in holders.values() if len(ends) > 1]
    alone = [sum(len(holders[page]) == 1 for page in pages) for _, _, pages in streams]
    return Load(
        np.asarray([length for length, _, _ in streams], np.int32),
        np.asarray([len(pages) for _, _, pages in streams], np.int32),
        np.asarray(alone, np.int32),
        np.asarray([remaining for _, remaining, _ in streams], np.int32),
        np.asarray(shared, np.int32),
    )


@st.composite
def stream_sets(draw: st.DrawFn) -> list[tuple[int, int, set[int]]]:
    """Streams in families that share leading pages."""
    streams = []
    for family in range(draw(st.integers(0, 4))):
        num_shared = draw(st.integers(0, 4))
        for member in range(draw(st.integers(1, 4))):
            length = num_shared * PAGE + draw(st.integers(1, 12))
            pages = {family * 100 + column for column in range(num_shared)}
            own = range(num_shared, -(-length // PAGE))
            pages |= {10_000 + family * 1000 + member * 100 + column for column in own}
            streams.append((length, draw(st.integers(0, 30)), pages))
    return streams


@settings(max_examples=200, deadline=None)
@given(stream_sets())
def test_the_forecast_peaks_where_the_step_by_step_simulation_does(
    streams: list[tuple[int, int, set[int]]],
) -> None:
    forecast = Forecast(load_of(streams), np.empty(0, np.int32), PAGE)
    assert forecast.peak == gold_peak(streams, PAGE)


@settings(max_examples=200, deadline=None)
@given(
    stream_sets(),
    st.integers(1, 20),
    st.integers(0, 30),
    st.integers(1, 4),
    st.integers(0, 5),
    st.integers(0, 60),
)
def test_as_many_arrivals_are_added_as_the_step_by_step_simulation_lets_in(
    streams: list[tuple[int, int, set[int]]],
    length: int,
    remaining: int,
    num_streams: int,
    num_matched: int,
    num_pages: int,
) -> None:
    donor = streams[0][2] if streams else set()
    num_full = length // PAGE
    matched = sorted(donor)[: min(num_matched, (length - 1) // PAGE)]
    ends = [max(end for _, end, pages in streams if page in pages) for page in matched]

    def with_arrivals(count: int) -> list[tuple[int, int, set[int]]]:
        full = set(matched) | {20_000 + column for column in range(len(matched), num_full)}

        def own(each: int) -> set[int]:
            if length % PAGE == 0:
                return set()
            return {30_000 + (each if remaining else 0)}  # those that end at once need no page of their own

        return [
            *streams,
            *((length, remaining, full | own(each)) for each in range(count)),
        ]

    forecast = Forecast(load_of(streams), np.asarray([remaining], np.int32), PAGE)
    num_new = -(-length // PAGE) - len(matched)
    arrival = Arrival(length, remaining, num_new, np.asarray(ends, np.int32))
    added = forecast.add_fitting(arrival, num_streams, num_pages)
    if gold_peak(streams, PAGE) > num_pages:
        assert added == 0
        return
    fitting = [count for count in range(num_streams + 1) if gold_peak(with_arrivals(count), PAGE) <= num_pages]
    assert added == max(fitting)
    assert forecast.peak == gold_peak(with_arrivals(added), PAGE)


def compare(harness: Harness) -> None:
    """The peak of what the manager measures of itself is that of its block tables, step by step."""
    state = harness.manager.state
    measured = measure_streams(state)
    remaining = state.predictor.predict_remaining(measured.num_planned, measured.limits)
    running = measure_running(state, measured, remaining)
    streams = []
    for row, slot in enumerate(measured.rows.tolist()):
        pages = set(state.slots.table[slot, : state.slots.num_pages[slot]].tolist())
        stream = state.slots.streams[slot]
        assert stream is not None
        if (
            stream.prefill is not None and slot != stream.prefill.slot
        ):  # reserved: it will share its leader's full pages
            full = stream.prefill.tokens.size // harness.sizes.page_size
            pages = set(state.slots.table[stream.prefill.slot, :full].tolist())
        streams.append((int(measured.lengths[row]), int(remaining[row]), pages))
    peak = Forecast(running.load, np.empty(0, np.int32), harness.sizes.page_size).peak
    assert peak == gold_peak(streams, harness.sizes.page_size)


def test_the_state_of_a_running_manager_is_measured_as_its_tables_say() -> None:
    rng = np.random.default_rng(5)
    harness = Harness(small_sizes(num_pages=200, num_slots=16, max_running=16, max_tokens_per_forward=20))
    state = harness.manager.state
    prefix = rng.integers(0, 40, 21).tolist()
    num_compared = 0
    for _ in range(300):
        if rng.random() < 0.2 and len(state.queue) < 3:
            prompt = prefix[: rng.integers(4, 21)] + rng.integers(0, 40, rng.integers(0, 9)).tolist()
            harness.submit(prompt, n=int(rng.integers(1, 4)), max_tokens=int(rng.integers(1, 40)))
        harness.plan()
        if not state.copies and not state.pages.held:  # those belong to neither a stream nor the tree
            compare(harness)
            num_compared += 1
        if harness.sent:
            harness.return_one()
    assert num_compared > 20
