"""The worker as its own process, spoken to over its two sockets as the supervisor and the manager do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toka_engine.channel import Channel, socket_pair
from toka_engine.config import EngineConfig
from toka_engine.control_messages import ChildReady, Failed, FromChild, Ping, Pong, Progress, Start
from toka_engine.errors import ExitCode
from toka_engine.messages import Step, Stop, Tokens, WorkerReady, WorkerToManager
from toka_engine.model.worker import make_warm_up_steps
from toka_engine.slot_parameters import SlotBatch

ENGINE = Path(__file__).parents[2] / "engine"
TIMEOUT_S = 280.0


@dataclass
class Process:
    popen: subprocess.Popen[bytes]
    control: Channel[FromChild]
    link: Channel[WorkerToManager]


def start_process(
    model_dir: Path, env: dict[str, str] | None = None, stderr: int = subprocess.DEVNULL, **settings: Any
) -> Process:
    control, child_control = socket_pair()
    link, child_link = socket_pair()
    fds = (child_control.fileno(), child_link.fileno())
    popen = subprocess.Popen(
        [sys.executable, "-m", "toka_engine.model", *map(str, fds)],
        pass_fds=fds,
        env={**os.environ, "PYTHONPATH": str(ENGINE), **(env or {})},
        stderr=stderr,
    )
    child_control.close()
    child_link.close()
    process = Process(popen, Channel(control, FromChild), Channel(link, WorkerToManager))
    defaults = {"device": "cpu", "dtype": "float32", "kv_cache_num_tokens": 4096, "num_threads": 1, "seed": 0}
    config = EngineConfig(**{**defaults, **settings})
    process.control.send(Start(config, str(model_dir), str(model_dir)))
    return process


@pytest.fixture
def start(make_tiny: Callable[..., tuple[Any, Path]]) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def make(model_dir: Path | None = None, **settings: Any) -> Process:
        started.append(start_process(model_dir or make_tiny()[1], **settings))
        return started[-1]

    yield make
    for process in started:
        process.popen.kill()
        process.popen.wait()
        process.control.close()
        process.link.close()


def receive_one(channel: Channel[Any], kind: type[Any]) -> Any:
    while True:
        messages = channel.receive(TIMEOUT_S)
        assert messages, f"no {kind.__name__} within {TIMEOUT_S} s"
        for message in messages:
            if isinstance(message, kind):
                return message
            assert isinstance(message, Progress)


def test_a_worker_reports_ready_runs_steps_in_order_and_stops(start: Callable[..., Process]) -> None:
    process = start()
    ready = receive_one(process.link, WorkerReady)
    assert (ready.vocab_size, ready.page_size, ready.num_pages, ready.max_positions) == (256, 16, 256, 128)
    assert (ready.device, ready.dtype, ready.max_seqs) == ("cpu", "float32", 256)
    receive_one(process.control, ChildReady)
    process.control.send(Ping(7))
    pong = receive_one(process.control, Pong)
    assert (pong.number, pong.busy_s, pong.num_begun, pong.num_done) == (7, 0.0, 0, 0)
    assert pong.cpu_s > 0
    assert pong.memory_bytes > 1 << 20
    steps = make_warm_up_steps(ready)
    for step in steps:
        process.link.send(step)
    process.link.send(Stop())
    answers: list[Tokens] = []
    while len(answers) < len(steps):
        answers += process.link.receive(TIMEOUT_S)
    assert all(answer.ids.size == 1 and 0 <= answer.ids[0] < 256 for answer in answers)
    assert process.popen.wait(TIMEOUT_S) == 0


def test_a_worker_says_what_is_wrong_with_its_model_and_ends_with_its_code(
    start: Callable[..., Process], make_tiny: Callable[..., tuple[Any, Path]]
) -> None:
    _, folder = make_tiny()
    (folder / "model.safetensors").unlink()
    process = start(folder)
    fatal = receive_one(process.control, Failed)
    assert fatal.exit_code == ExitCode.MODEL_INVALID
    assert "model.safetensors" in fatal.message
    assert process.popen.wait(TIMEOUT_S) == ExitCode.MODEL_INVALID


def test_a_worker_ends_when_its_manager_is_gone(start: Callable[..., Process]) -> None:
    process = start()
    receive_one(process.link, WorkerReady)
    process.link.close()
    assert process.popen.wait(TIMEOUT_S) == ExitCode.PROCESS_DIED
    process.link = Channel(socket.socket(), WorkerToManager)


def test_signals_of_a_terminal_are_left_to_the_supervisor(start: Callable[..., Process]) -> None:
    process = start()
    receive_one(process.link, WorkerReady)
    for signum in (signal.SIGINT, signal.SIGTERM):
        process.popen.send_signal(signum)
    process.link.send(Step(number=3))
    assert receive_one(process.link, Tokens).number == 3


def test_a_row_whose_logits_are_not_finite_fails_alone(make_tiny: Callable[..., tuple[Any, Path]]) -> None:
    from safetensors.torch import load_file, save_file

    from tests.model.driving import Driver, load

    _, folder = make_tiny()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][99] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    driver = Driver(load(folder))
    healthy = driver.generate([[5, 6, 7]], 6)[0]
    driver.reset()
    first = driver.prefill({0: [5, 6, 7], 1: [5, 99, 7]}).ids.tolist()
    assert first == [healthy[0], -1]
    outputs = [driver.decode([0, 1]).ids.tolist() for _ in range(3)]
    assert [output[0] for output in outputs] == healthy[1:4]
    assert all(output[1] == -1 for output in outputs)
    # The failed row's page goes to a new sequence: nothing of it may be left.
    page = driver.pages[1][0]
    driver.lengths[2], driver.pages[2] = 0, [page]
    appended = {"append_slots": np.array([2], np.int32), "append_indices": np.zeros(1, np.int32)}
    driver.run(**driver.add_slots([2]), **appended, append_pages=np.array([page], np.int32))
    assert driver.prefill({2: [5, 6, 7]}, new=SlotBatch()).ids.tolist() == [healthy[0]]
    assert driver.decode([2]).ids.tolist() == [healthy[1]]
