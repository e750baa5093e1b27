"""Ranks that are processes, over gloo: they say what one process says, listen on loopback alone, and notice a loss."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from toka_engine.errors import PeerClosedError
from toka_engine.model.cpu.gloo_ranks import GlooRanks
from toka_engine.model.ranks import sum_in_order

from tests.model.driving import Driver, load
from tests.model.test_logits import IDS

NUM_TOKENS = 6
SAMPLING: dict[str, Any] = {"temperature": [0, 1, 1], "seed": [-1, 7, 8], "top_k": [0, 0, 9], "num_logprobs": 2}
LOST = "the second one is gone"


def generate(driver: Driver) -> list[list[int]]:
    return driver.generate([IDS[:9], IDS[5:30], IDS[2:6]], NUM_TOKENS, **SAMPLING)


def run_rank(rank: int, rendezvous: Path, folder: Path, parent: Connection) -> None:
    """One of two processes: answer what the parent compares, then wait for a rank that it has killed."""
    ranks = GlooRanks(rendezvous / "dp0", rank, 2)
    listening = [each for each in psutil.Process().net_connections() if each.status == psutil.CONN_LISTEN]
    addresses = {each.laddr.ip for each in listening}
    part = torch.arange(6, dtype=torch.bfloat16).view(2, 3) + rank / 3
    parts = ranks.all_gather(part)
    sums = sum_in_order(torch.stack([torch.arange(6, dtype=torch.bfloat16).view(2, 3) + each / 3 for each in (0, 1)]))
    is_right = torch.equal(parts[rank], part) and torch.equal(ranks.all_reduce(part), sums)
    parent.send((addresses, is_right, ranks.agree_min(7 - rank), generate(Driver(load(folder, ranks)))))
    if rank == 0:
        parent.recv()
        try:
            ranks.all_reduce(part)
        except PeerClosedError:
            parent.send(LOST)
    parent.recv()


@pytest.fixture
def rendezvous(tmp_path: Path) -> Path:
    folder = tmp_path / "rendezvous"
    folder.mkdir(mode=0o700)
    return folder


def test_two_processes_say_what_one_says_and_one_notices_the_others_end(
    make_tiny: Callable[..., tuple[Any, Path]], rendezvous: Path
) -> None:
    _, folder = make_tiny("Qwen2")
    context = multiprocessing.get_context("spawn")
    links = [context.Pipe() for _ in range(2)]
    processes = [
        context.Process(target=run_rank, args=(rank, rendezvous, folder, child), daemon=True)
        for rank, (_, child) in enumerate(links)
    ]
    for process in processes:
        process.start()
    try:
        expected = generate(Driver(load(folder)))
        for link, _ in links:
            assert link.poll(120)
            assert link.recv() == ({"127.0.0.1"}, True, 6, expected)
        second = processes[1].pid
        assert second is not None
        os.kill(second, signal.SIGKILL)
        processes[1].join(20)
        links[0][0].send("go on")
        assert links[0][0].poll(20)
        assert links[0][0].recv() == LOST
    finally:
        for process in processes:
            process.kill()
            process.join()
