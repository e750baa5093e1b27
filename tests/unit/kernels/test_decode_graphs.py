"""Decode steps that replay graphs, on a CPU that stands for the device, sample what is sampled without graphs.

tests/gpu/test_decode_graphs.py runs real graphs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toka_engine.model.config_fields import ConfigFields
from toka_engine.model.model_config import parse_model_config
from toka_engine.model.stages import Stage

from tests.model.driving import Driver
from tests.unit.kernels.conftest import ON_GPU
from tests.unit.kernels.simulated_graphs import kept_as_one, simulated_graphs
from tests.unit.kernels.test_stage_runners import MODEL, AtOnce, attend_decode, make_driver, make_runner

pytestmark = pytest.mark.skipif(ON_GPU, reason="tests/gpu/test_decode_graphs.py runs them on a GPU")


@pytest.fixture
def drivers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Without graphs, and with graphs of 1, 2 and 4 rows."""
    monkeypatch.setattr("toka_engine.model.cuda.graph_sizes._SMALL_SIZES", (1, 2, 4))
    monkeypatch.setattr(torch.cuda, "Event", AtOnce)
    monkeypatch.setattr("toka_engine.model.cuda.attention.attend_decode", kept_as_one(attend_decode))
    model = parse_model_config(ConfigFields({**MODEL, "num_hidden_layers": 1}, Path()))
    plain, graphed = (make_driver(make_runner(model, Stage.whole(model.num_layers))) for _ in range(2))
    runner = graphed.worker.runner
    _reserve_results(runner)
    with simulated_graphs(monkeypatch), torch.inference_mode():
        graphs = runner.make_decode_graphs(4)
        graphs.capture()
        runner.decode_graphs = graphs
        yield plain, graphed


def _reserve_results(runner: Any) -> None:
    """Give the runner what it awaits the tokens of graphs with, which has no device here."""
    from toka_engine.model.cuda.runner import RING_SIZE, CudaLaunched, CudaRunner

    runner._published, runner._is_awaited = [AtOnce() for _ in range(RING_SIZE)], [False] * RING_SIZE
    finish_others = runner.finish
    runner.finish = lambda launched: (
        CudaRunner.finish(runner, launched) if isinstance(launched, CudaLaunched) else finish_others(launched)
    )


def test_what_graphs_sample_is_what_is_sampled_without_them(drivers: tuple[Driver, Driver]) -> None:
    plain, graphed = drivers
    graphs: Any = graphed.worker.runner.decode_graphs
    assert sorted(size for size, _ in graphs._forwards) == [1, 2, 4]

    def check(act: Any) -> list[int]:
        found, expected = act(graphed), act(plain)
        assert found.ids.tolist() == expected.ids.tolist()
        return found.ids.tolist()

    prompts = {slot: [5 + slot, 6, 7, 8][: 1 + slot] for slot in range(5)}
    asked = {"temperature": [0.0, 1.0, 0.7, 0.0, 0.9], "seed": [-1, -1, -1, -1, 1]}
    check(lambda driver: driver.prefill(prompts, **driver.add_slots(list(prompts), **asked)))
    rows = [0, 1, 2], [3], [1, 3], list(range(5)), [1], [4, 0]  # five are more than graphs hold
    sampled = [check(lambda driver, slots=slots: driver.decode(slots)) for slots in rows]
    assert len({token for ids in sampled for token in ids}) > 5
    assert [graphs._forwards[size, False][0].num_replays for size in (1, 2, 4)] == [2, 2, 1]
    assert [graphs._samplers[size].num_replays for size in (1, 2, 4)] == [2, 1, 1]  # a row with a seed is not plain


def test_rows_that_ask_for_more_are_sampled_outside_and_go_on_inside(drivers: tuple[Driver, Driver]) -> None:
    graphs: Any = drivers[1].worker.runner.decode_graphs
    for driver in drivers:
        driver.prefill({0: [3, 4], 1: [9]}, **driver.add_slots([0, 1]))
    for turn in range(4):
        new = {"num_logprobs": 0 if turn % 2 else -1}
        tokens = []
        for driver in drivers:
            setup = driver.add_slots([0, 1], [driver.lengths[0], driver.lengths[1]], **new)
            tokens.append(driver.decode([0, 1], **setup))
        assert tokens[0].ids.tolist() == tokens[1].ids.tolist()
        assert (tokens[1].logprobs.size > 0) == (turn % 2 == 1)
    assert graphs._forwards[2, False][0].num_replays == 4
    assert graphs._samplers[2].num_replays == 2
