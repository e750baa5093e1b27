"""The manager as a real process over real socket pairs; the test plays supervisor, server and worker."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import toka_engine
from toka_engine.channel import Channel, socket_pair
from toka_engine.codec import encode
from toka_engine.config import EngineConfig
from toka_engine.control_messages import ChildReady, Failed, FromChild, Ping, Pong, Progress, RankInfo, Start
from toka_engine.errors import ExitCode
from toka_engine.manager.sizes import choose_sizes
from toka_engine.messages import (
    Deltas,
    EngineInfo,
    ManagerToServer,
    ManagerToWorker,
    Stats,
    Step,
    Submit,
    Tokens,
    WorkerReady,
)
from toka_engine.slot_parameters import Sampling

from tests.engine_process import WAIT_S
from tests.unit.manager.simulated import HashModel, SimulatedWorker, reference

pytestmark = pytest.mark.timeout(30)

READY = WorkerReady(
    vocab_size=40,
    max_positions=256,
    num_pages=64,
    page_size=4,
    max_seqs=8,
    max_tokens_per_forward=32,
    max_pages_per_seq=64,
    device="cpu",
    dtype="float32",
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=4,
)


ONE_RANK = RankInfo()


class Process:
    """A running manager and the other ends of its links."""

    def __init__(self, rank: RankInfo = ONE_RANK) -> None:
        pairs = [socket_pair() for _ in range(2 + rank.pp_size * rank.tp_size)]
        fds = [theirs.fileno() for _, theirs in pairs]
        root = Path(toka_engine.__file__).parents[1]
        command = [sys.executable, "-m", "toka_engine.manager", *map(str, fds)]
        self.process = subprocess.Popen(
            command, pass_fds=fds, env=os.environ | {"PYTHONPATH": str(root)}, stderr=subprocess.DEVNULL
        )
        for _, theirs in pairs:
            theirs.close()
        self.control: Channel[FromChild] = Channel(pairs[0][0], FromChild)
        self.server: Channel[ManagerToServer] = Channel(pairs[1][0], ManagerToServer)
        self.workers: list[Channel[ManagerToWorker]] = [Channel(ours, ManagerToWorker) for ours, _ in pairs[2:]]
        self.worker = self.workers[0]
        self.config = EngineConfig()
        self.control.send(Start(self.config, "", "", "manager", rank))

    def close(self) -> None:
        for channel in (self.control, self.server, *self.workers):
            channel.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def process() -> Iterator[Process]:
    running = Process()
    yield running
    running.close()


def test_requests_go_through_the_real_process_over_its_links(process: Process) -> None:
    process.worker.send(READY)
    info, *early = process.server.receive(20)
    assert isinstance(info, EngineInfo)
    assert (info.max_request_tokens, info.max_streams, info.num_kv_tokens) == (256, 8, 256)
    phases = []
    while not phases or not isinstance(phases[-1], ChildReady):
        phases += process.control.receive(20)

    # Before any request the totals come once, so that a server can show them.
    (first_stats,) = early or process.server.receive(20)
    assert isinstance(first_stats, Stats)
    assert (first_stats.kv_pages_total, first_stats.steps_total) == (64, 0)

    model = HashModel()
    worker = SimulatedWorker(choose_sizes(process.config, READY), model)
    submit = Submit(0, 3, np.arange(10, dtype=np.int32), 20, Sampling(seed=5), (), True)
    process.server.send(submit)
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    ended: list[int] = []
    last_stats: Stats | None = None
    while len(ended) < 3:
        for step in process.worker.receive(0.05):
            assert isinstance(step, Step)
            process.worker.send(msgspec.structs.replace(worker.run(step), step_wall_s=1000.0, host_cpu_s=0.5))
        for message in process.server.receive_ready():
            if isinstance(message, Deltas):
                for stream, token in zip(message.streams.tolist(), message.tokens.tolist(), strict=True):
                    tokens[stream].append(token)
                ended += message.ended.tolist()
            elif isinstance(message, Stats):
                last_stats = message
    assert tokens == {choice: reference(model, submit, choice).tokens for choice in range(3)}

    # Totals come once more when the work is over; then the process sleeps.
    while last_stats is None or last_stats.output_tokens_total < 60:
        for message in process.server.receive(20):
            assert isinstance(message, Stats)
            last_stats = message
    assert (last_stats.running, last_stats.waiting, last_stats.kv_pages_used) == (0, 0, 0)
    num_steps = last_stats.steps_total
    assert num_steps >= 20
    assert (last_stats.step_wall_s_total, last_stats.model_cpu_s_total) == (1000.0 * num_steps, 0.5 * num_steps)
    assert 1000.0 <= last_stats.step_busy_s_total < 2000.0, "steps that overlap count once"


def test_the_control_link_is_answered_while_the_manager_waits_for_its_workers(process: Process) -> None:
    messages: list[FromChild] = process.control.receive(20)
    assert isinstance(messages[0], Progress)
    process.control.send(Ping(7))
    while not any(isinstance(message, Pong) and message.number == 7 for message in messages):
        messages += process.control.receive(20)


def test_a_lost_worker_ends_the_process_with_the_code_of_the_table(process: Process) -> None:
    process.worker.send(READY)
    process.server.receive(20)
    process.worker.close()
    assert process.process.wait(WAIT_S) == ExitCode.PROCESS_DIED


@pytest.mark.parametrize("frame", [b"\x02\x00\x00\x00\xc1\xc1", b"\xff\xff\xff\xff"], ids=["garbage", "too-long"])
def test_a_broken_frame_ends_the_process_with_a_clear_error(process: Process, frame: bytes) -> None:
    process.worker.send(READY)
    process.server.receive(20)
    os.write(process.worker.fileno(), frame)
    assert process.process.wait(WAIT_S) == ExitCode.PROCESS_DIED
    messages: list[FromChild] = []
    while not any(isinstance(message, Failed) for message in messages):
        messages += process.control.receive(20)
    (fatal,) = [message for message in messages if isinstance(message, Failed)]
    assert fatal.exit_code == ExitCode.PROCESS_DIED
    assert "frame" in fatal.message
    assert not fatal.is_consequence


def test_all_ranks_get_the_same_steps_and_the_output_rank_alone_gives_tokens() -> None:
    process = Process(RankInfo(pp_size=2, tp_size=2))
    output = process.workers[2]  # the first one of the last stage
    try:
        for index, worker in enumerate(process.workers):
            worker.send(msgspec.structs.replace(READY, num_pages=64 - index, num_layers=1 + index))
        info = process.server.receive(20)[0]
        assert isinstance(info, EngineInfo)
        assert info.num_kv_tokens == 61 * READY.page_size, "as many pages as the smallest rank has"
        process.server.send(Submit(0, 1, np.arange(3, dtype=np.int32), 1, Sampling(), (), True))
        steps = [worker.receive(20)[0] for worker in process.workers]
        assert {encode(step) for step in steps} == {encode(steps[0])}
        assert isinstance(steps[0], Step)
        for worker, token in ((process.workers[0], 5), (output, 7)):
            worker.send(Tokens(steps[0].number, np.array([token], np.int32)))
        tokens: list[int] = []
        while not tokens:
            for message in process.server.receive(20):
                tokens += message.tokens.tolist() if isinstance(message, Deltas) else []
        assert tokens == [7]
    finally:
        process.close()


def test_ranks_that_disagree_end_the_process_with_what_they_disagree_on() -> None:
    process = Process(RankInfo(tp_size=2))
    try:
        process.workers[0].send(READY)
        process.workers[1].send(msgspec.structs.replace(READY, page_size=8))
        assert process.process.wait(WAIT_S) == ExitCode.PROCESS_DIED
        messages = process.control.receive(20)
        while not isinstance(messages[-1], Failed):
            messages += process.control.receive(20)
        assert "the model workers disagree on page_size: 4, 8" in messages[-1].message
    finally:
        process.close()
