"""Running ahead keeps its promises on the device, too. The stream is held back first, so that all that follows is
queued: a guard that is missing shows as a value of a later step in an earlier one."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toka_engine.messages import Step, Tokens
from toka_engine.model.backend import Launched
from toka_engine.model.cuda.flashinfer_prefill import _Workspace
from toka_engine.model.cuda.staging import Staging
from toka_engine.model.in_flight import RING_SIZE

from tests.gpu.test_parity import make
from tests.model.driving import Driver, load

DEVICE = torch.device("cuda")
LONG_CYCLES, SHORT_CYCLES = 400_000_000, 10_000_000  # some 200 and 5 ms


def hold_back(cycles: int) -> None:
    torch.cuda._sleep(cycles)


def test_a_pinned_buffer_is_not_written_while_an_earlier_copy_of_it_is_queued() -> None:
    depth = 3
    staging = Staging(DEVICE, capacity=1024, depth=depth)
    hold_back(LONG_CYCLES)
    seen = [staging.upload(np.full(500, value, np.int32))[0].clone() for value in range(3 * depth)]
    torch.cuda.synchronize()
    assert [each.unique().tolist() for each in seen] == [[value] for value in range(3 * depth)]


def test_pinned_buffers_grow_without_losing_what_is_queued() -> None:
    staging = Staging(DEVICE, capacity=64, depth=3)
    hold_back(LONG_CYCLES)
    sizes = [40, 50, 60, 500, 40, 3000, 10]
    seen = [staging.upload(np.full(size, size, np.int32))[0].clone() for size in sizes]
    torch.cuda.synchronize()
    assert [(each.numel(), each.unique().tolist()) for each in seen] == [(size, [size]) for size in sizes]


def test_a_schedule_is_not_written_while_an_earlier_copy_of_it_is_queued() -> None:
    workspace = _Workspace(DEVICE, 4096)
    hold_back(LONG_CYCLES)
    seen = []
    for value in range(3 * RING_SIZE):
        pinned = workspace.take_pinned()
        pinned.fill_(value)
        workspace.device_ints.copy_(pinned, non_blocking=True)
        workspace.planned()
        seen.append(workspace.device_ints.clone())
    torch.cuda.synchronize()
    assert [each.unique().tolist() for each in seen] == [[value] for value in range(3 * RING_SIZE)]


class Recorder(Driver):
    """Keeps the steps that it runs, one by one, and their tokens."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.steps: list[Step] = []
        self.tokens: list[list[int]] = []

    def run(self, **fields: Any) -> Tokens:
        self.steps.append(Step(number=len(self.steps) + 1, **fields))
        tokens = self.worker.runner.finish(self.worker.runner.launch(self.steps[-1]))
        self.tokens.append(tokens.ids.tolist())
        return tokens


def play(driver: Driver) -> None:
    """Prompts of several lengths, pages appended at different steps, slots given to others with other pages between two
    steps."""
    random = np.random.default_rng(4)

    def prompts(*slots: int) -> dict[int, list[int]]:
        return {slot: random.integers(3, 1000, 5 + 7 * slot).tolist() for slot in slots}

    driver.prefill(prompts(0, 1, 2, 3, 4))
    for slots in ([1, 3], [0, 4], [2, 1]):
        for _ in range(9):
            driver.decode([0, 1, 2, 3, 4])
        for slot in slots:  # their next owners: other pages, from the first column on
            driver.pages[slot] = []
            driver.lengths[slot] = 0
        driver.prefill(prompts(*slots))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("Llama")
    make("Llama", folder)
    return folder


@pytest.mark.parametrize("use_cudagraphs", [True, False], ids=["graphs", "eager"])
def test_steps_queued_behind_each_other_give_what_they_give_one_by_one(folder: Path, use_cudagraphs: bool) -> None:
    worker = load(
        folder,
        device="cuda",
        dtype="bfloat16",
        max_seqs_per_forward=64,
        cudagraph_max_size=40,
        use_cudagraphs=use_cudagraphs,
    )
    worker.warm_up()
    recorder = Recorder(worker)
    play(recorder)
    runner, most = worker.runner, worker.runner.max_steps_in_flight
    assert 1 < most <= RING_SIZE
    launched: deque[Launched] = deque()
    tokens = []
    for step in recorder.steps:
        hold_back(SHORT_CYCLES)
        launched.append(runner.launch(step))
        if len(launched) == most:
            tokens.append(runner.finish(launched.popleft()).ids.tolist())
    tokens += [runner.finish(each).ids.tolist() for each in launched]
    assert tokens == recorder.tokens
    assert len({id for step in tokens for id in step}) > 10
