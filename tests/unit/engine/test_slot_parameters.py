"""The table of a slot's parameters, and batches of new slots on the wire."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toka_engine.codec import Decoder, encode
from toka_engine.messages import ManagerToWorker, Step
from toka_engine.slot_parameters import FILTER, PENALTY, SLOT_COLUMNS, Sampling, SlotBatch

samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
    top_p=st.sampled_from([0.25, 1.0]),
    top_k=st.sampled_from([0, 40]),
    seed=st.integers(-1, 2**63 - 1),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
)


def test_every_field_of_sampling_is_a_column_with_its_default() -> None:
    columns = {column.name: column for column in SLOT_COLUMNS}
    for name, default in msgspec.structs.asdict(Sampling()).items():
        assert columns[name].default == default
        assert columns[name].dtype.type(default) == default, "the default is exact in the column's dtype"
    assert {column.dtype.itemsize for column in SLOT_COLUMNS} <= {4, 8}


@given(st.lists(samplings, min_size=1, max_size=5), st.integers(1, 3))
def test_what_streams_ask_for_arrives_at_the_worker(asked: list[Sampling], num_choices: int) -> None:
    each = [sampling for sampling in asked for _ in range(num_choices)]
    slots, lengths = list(range(7, 7 + len(each))), list(range(len(each)))
    seeds = [sampling.seed // 2 for sampling in each]
    batch = SlotBatch.of_streams(slots, each, length=lengths, seed=seeds)
    frame = encode(Step(1, new=batch))
    new = Decoder[Any](ManagerToWorker).decode(frame).new
    assert new.slots.tolist() == slots
    zeros = [0] * len(each)
    none_yet = {"length": lengths, "seed": seeds, "num_sampled": zeros, "grammar": zeros}
    for column in SLOT_COLUMNS:
        values: list[Any] = none_yet.get(column.name, [])
        expected = np.array(values or [getattr(sampling, column.name) for sampling in each], column.dtype)
        assert new[column.name].dtype == column.dtype
        assert new[column.name].tolist() == expected.tolist()
        assert (column.name in new.columns) == bool((expected != column.dtype.type(column.default)).any())


def test_defaults_cost_nothing_on_the_wire() -> None:
    assert len(encode(Step(1, new=SlotBatch.of(range(1000), top_p=1.0, seed=-1)))) < 1000 * 4 + 100


def test_a_row_takes_the_parts_of_the_sampler_that_it_asks_for() -> None:
    batch = SlotBatch.of([4, 5, 6], top_k=[0, 3, 0], min_p=[0.0, 0.0, 0.1], presence_penalty=[0.5, 0.0, 0.0])
    assert batch.asks_for(FILTER).tolist() == [False, True, True]
    assert batch.asks_for(PENALTY).tolist() == [True, False, False]


def test_an_unknown_column_is_an_error() -> None:
    with pytest.raises(KeyError, match="top_q"):
        SlotBatch.of([0], top_q=0.5)
