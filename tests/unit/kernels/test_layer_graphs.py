"""Steps whose layers are graphs from one attention to the next give what steps launched kernel by kernel give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toka_engine.config import EngineConfig
from toka_engine.model.config_fields import ConfigFields
from toka_engine.model.model_config import parse_model_config
from toka_engine.model.stages import Stage

from tests.unit.kernels.conftest import ON_GPU
from tests.unit.kernels.simulated_graphs import simulated_graphs
from tests.unit.kernels.test_stage_runners import MODEL, AtOnce, attend_decode, make_driver, make_runner

pytestmark = pytest.mark.skipif(ON_GPU, reason="tests/gpu/test_layer_graphs.py runs them on a GPU")


def test_the_numbers_of_rows_are_close_where_a_row_costs_most_and_end_at_the_limit() -> None:
    from toka_engine.model.cuda.graph_sizes import layer_graph_sizes

    assert layer_graph_sizes(1) == [1]
    assert layer_graph_sizes(32) == [32]
    assert layer_graph_sizes(100) == [32, 64, 96, 100]
    assert layer_graph_sizes(256) == [32, 64, 96, 128, 192, 256]
    assert layer_graph_sizes(1200)[-4:] == [960, 1024, 1152, 1200]


@pytest.mark.parametrize(
    ("layer", "tp_size", "rows"),
    [
        ((2048, 8192, 32, 8, 64), 1, 1024),  # Llama-3.2-1B
        ((4096, 14336, 32, 8, 128), 1, 512),  # Llama-3.1-8B
        ((4096, 14336, 32, 8, 128), 2, 1024),
        ((8192, 28672, 64, 8, 128), 1, 128),  # Llama-3.1-70B
        ((8192, 28672, 64, 8, 128), 4, 512),
        ((1 << 16, 1 << 18, 64, 64, 128), 1, 64),
    ],
)
def test_the_larger_a_layer_the_fewer_rows_have_graphs(
    layer: tuple[int, int, int, int, int], tp_size: int, rows: int
) -> None:
    from toka_engine.model.cuda.graph_sizes import choose_layer_rows

    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    model = parse_model_config(ConfigFields({**MODEL, **dict(zip(names, layer, strict=True))}, Path()))
    assert choose_layer_rows(EngineConfig(tp_size=tp_size), model) == rows
    fp8 = EngineConfig(tp_size=tp_size, quantization="fp8")
    assert choose_layer_rows(fp8, model) == min(1024, rows + rows // 128 * 128)
    for asked in (0, 7, 4096):
        assert choose_layer_rows(EngineConfig(tp_size=tp_size, cudagraph_max_prefill_size=asked), model) == asked


def test_memory_of_captures_is_what_the_largest_take_and_what_later_ones_take_as_such(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from toka_engine.model.cuda import graph_sizes

    def estimate(sizes: list[int], taken: dict[int, int]) -> int:
        free, captured = 10_000, []
        monkeypatch.setattr(graph_sizes, "_read_free_bytes", lambda: free - sum(taken[size] for size in captured))
        found = graph_sizes.measure_captures(sizes, captured.append)
        assert captured == sizes[::-1][:4]
        return found

    assert estimate([], {}) == 0
    assert estimate([5], {5: 70}) == 70
    assert estimate([3, 5], {3: 10, 5: 70}) == 80
    assert estimate([1, 2, 3, 4, 5], {5: 70, 4: 30, 3: 2, 2: 4}) == 106 + 4
    assert estimate(list(range(20)), {19: 70, 18: 30, 17: 4, 16: 2}) == 106 + 4 * 16
    assert estimate(list(range(20)), {19: 70, 18: 30, 17: 0, 16: 0}) == 100


def mixed(driver: Any, new: dict[int, list[int]], decode: list[int]) -> Any:
    """One step: a row for each slot of `decode` beside the prompts of `new`, all of which are sampled."""
    setup = driver.add_slots(list(new))
    for slot in decode:
        driver.lengths[slot] += 1
    pages = driver.grow({**{slot: driver.lengths[slot] for slot in decode}, **{s: len(ids) for s, ids in new.items()}})
    lengths = [len(ids) for ids in new.values()]
    prompts = [token for ids in new.values() for token in ids]
    fields = {
        "decode_slots": decode,
        "prefill_slots": list(new),
        "prefill_starts": [0] * len(new),
        "prefill_lengths": lengths,
        "prefill_tokens": prompts,
        "fanout_slots": list(new),
        "fanout_chunks": list(range(len(new))),
    }
    arrays = {name: np.array(values, np.int32) for name, values in fields.items()}
    tokens = driver.run(**setup, **pages, **arrays)
    driver.lengths.update(zip(new, lengths, strict=True))
    return tokens


def test_mixed_steps_of_any_number_of_rows_say_what_they_say_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", AtOnce)
    monkeypatch.setattr("toka_engine.model.cuda.attention.attend_decode", attend_decode)
    model = parse_model_config(ConfigFields({**MODEL, "num_hidden_layers": 2}, Path()))
    plain, pieced = (make_driver(make_runner(model, Stage.whole(model.num_layers))) for _ in range(2))
    runner = pieced.worker.runner
    monkeypatch.setattr("toka_engine.model.cuda.graph_sizes._LAYER_STEPS", ((64, 8),))
    with simulated_graphs(monkeypatch):
        runner._max_layer_rows = 12
        runner._capture_layers(max_tokens=64)
        graphs = runner.layer_graphs
        assert sorted(graphs._pieces) == [8, 12]
        assert all(len(pieces.others) == model.num_layers for pieces in graphs._pieces.values())
        random = np.random.default_rng(0)

        def prompt(length: int) -> list[int]:
            return random.integers(model.vocab_size, size=length).tolist()

        steps = [({0: prompt(1), 1: prompt(6)}, []), ({2: prompt(10)}, [0]), ({3: prompt(10)}, [0, 1]), ({4: [1]}, [2])]
        steps += [({5: prompt(12)}, [0]), ({}, [0, 1, 5])]  # the first is too large
        for new, decode in steps:
            expected, found = mixed(plain, new, decode), mixed(pieced, new, decode)
            np.testing.assert_array_equal(found.ids, expected.ids)
            assert torch.equal(pieced.logits, plain.logits)
            assert plain.logits.std() > 0.1
    assert [graphs._pieces[size].first.num_replays for size in (8, 12)] == [3, 2]


def test_a_step_pads_nothing_that_attention_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that pad a graph have neither keys nor values: pages that belong to nobody stay as they are."""
    monkeypatch.setattr(torch.cuda, "Event", AtOnce)
    monkeypatch.setattr("toka_engine.model.cuda.attention.attend_decode", attend_decode)
    model = parse_model_config(ConfigFields({**MODEL, "num_hidden_layers": 1}, Path()))
    driver = make_driver(make_runner(model, Stage.whole(model.num_layers)))
    runner = driver.worker.runner
    with simulated_graphs(monkeypatch):
        runner._max_layer_rows = 20
        runner._capture_layers(max_tokens=64)
        mixed(driver, {0: list(range(20))}, [])  # leaves something in all rows
        before = runner.attention.cache.clone()
        mixed(driver, {1: [7, 8]}, [0])
    changed = (runner.attention.cache != before).flatten(3).any(-1).any(0).any(0).nonzero().flatten().tolist()
    assert changed == sorted({driver.pages[0][-1], *driver.pages[1]})
