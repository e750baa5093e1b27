"""Pipeline stages, of tensor parallel ranks each, as threads of one process. Their links are those of processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from toka_engine.channel import socket_pair
from toka_engine.control_messages import RankInfo
from toka_engine.errors import PeerClosedError
from toka_engine.model.ranks import Ranks
from toka_engine.model.stage_links import StageLinks
from toka_engine.topology import place_ranks

from tests.model.thread_ranks import ThreadRanks

Result = TypeVar("Result")


def link_stages(pp_size: int, tp_size: int = 1) -> dict[tuple[int, int], StageLinks]:
    """The links of all ranks, by stage and rank."""
    ranks = list(place_ranks(RankInfo(pp_size=pp_size, tp_size=tp_size)))
    pairs = {(rank.pp_rank, rank.tp_rank): socket_pair() for rank in ranks}  # from each to the one behind it
    return {
        (rank.pp_rank, rank.tp_rank): StageLinks(
            rank, pairs[(rank.pp_rank - 1) % pp_size, rank.tp_rank][1], pairs[rank.pp_rank, rank.tp_rank][0]
        )
        for rank in ranks
    }


def run_stages(pp_size: int, tp_size: int, work: Callable[[Ranks, StageLinks], Result]) -> list[list[Result]]:
    """Run `work` as each rank of each stage; what each returns, by stage. Raises the first one's own error."""
    links = link_stages(pp_size, tp_size)
    barriers = [threading.Barrier(tp_size) for _ in range(pp_size)]
    parts = [[torch.empty(0)] * tp_size for _ in range(pp_size)]

    def run(stage: int, rank: int) -> Result:
        own = links[stage, rank]
        try:
            return work(ThreadRanks(rank, parts[stage], barriers[stage]), own)
        except BaseException:
            barriers[stage].abort()
            for end in own.sockets:
                end.shutdown(2)
            raise

    with ThreadPoolExecutor(pp_size * tp_size) as pool:
        futures = [[pool.submit(run, stage, rank) for rank in range(tp_size)] for stage in range(pp_size)]
    errors = [error for each in futures for future in each if (error := future.exception()) is not None]
    for own in links.values():
        for end in own.sockets:
            end.close()
    errors.sort(key=lambda error: isinstance(error, threading.BrokenBarrierError | PeerClosedError | OSError))
    if errors:
        raise errors[0]
    return [[future.result() for future in each] for each in futures]
