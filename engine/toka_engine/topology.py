"""Which processes an engine has, what links them, and what each of them is: pure data.

A *rank* is one model worker. A *stage* is the tensor parallel ranks that hold the same layers. A *replica* is one
manager with its stages. The supervisor starts what stands here; its limits and the names in the log go by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from toka_engine.config import EngineConfig
from toka_engine.control_messages import RankInfo


class Role(StrEnum):
    """The role of a process. The value names a process that is the only one of its role."""

    RESOLVE = "resolve"
    """Finds the model's files, and ends before the others start."""
    SERVER = "server"
    MANAGER = "manager"
    MODEL = "model"


@dataclass(frozen=True, slots=True)
class Process:
    """One process."""

    name: str
    """In the log, in errors and in metrics."""
    role: Role
    rank: RankInfo
    """A manager has the number of its replica and all sizes, the server the sizes alone."""


@dataclass(frozen=True, slots=True)
class Link:
    """A socket pair between two processes, by name. `first` is nearer to the client, or the stage before."""

    first: str
    second: str


@dataclass(frozen=True, slots=True)
class Topology:
    """The processes of an engine that serves, in the order in which they start.

    A process finds the links that lead to it, then those that lead away, each in the order of `links`: the server its
    managers, a manager the server and then its ranks, stage by stage, a rank its manager and, of several stages, the
    ranks before and behind it. These form rings: behind the last stage comes the first, which gets the tokens.
    """

    processes: tuple[Process, ...]
    links: tuple[Link, ...]


RESOLVER = Process(Role.RESOLVE.value, Role.RESOLVE, RankInfo())
SERVER = Process(Role.SERVER.value, Role.SERVER, RankInfo())


def choose_topology(config: EngineConfig) -> Topology:
    """Return the topology that `config` asks for."""
    return make_topology(RankInfo(dp_size=config.dp_size, pp_size=config.pp_size, tp_size=config.tp_size))


def make_topology(sizes: RankInfo) -> Topology:
    """Return the topology of so many replicas, stages, and ranks of a stage; the numbers of `sizes` are 0."""
    replicas = [msgspec.structs.replace(sizes, dp_rank=number) for number in range(sizes.dp_size)]
    server = Process(SERVER.name, Role.SERVER, sizes)
    managers = [Process(name_process(Role.MANAGER, rank), Role.MANAGER, rank) for rank in replicas]
    ranks = [rank for each in replicas for rank in place_ranks(each)]
    models = [Process(name_process(Role.MODEL, rank), Role.MODEL, rank) for rank in ranks]
    links = [Link(server.name, manager.name) for manager in managers]
    links += [Link(name_process(Role.MANAGER, model.rank), model.name) for model in models]
    if sizes.pp_size > 1:
        links += [Link(model.name, name_process(Role.MODEL, find_next(model.rank))) for model in models]
    return Topology((server, *managers, *models), tuple(links))


def place_ranks(rank: RankInfo) -> Iterator[RankInfo]:
    """Return the ranks of the replica of `rank`, in the order in which its manager finds their links."""
    for stage in range(rank.pp_size):
        for part in range(rank.tp_size):
            yield msgspec.structs.replace(rank, pp_rank=stage, tp_rank=part)


def find_output_rank(rank: RankInfo) -> int:
    """Return which of the ranks of its replica, in that order, sends the tokens."""
    return next(index for index, each in enumerate(place_ranks(rank)) if each.is_output_rank)


def find_stage_ranks(rank: RankInfo) -> list[RankInfo]:
    """Return the ranks that hold the same layers as `rank`, in rank order."""
    return [msgspec.structs.replace(rank, tp_rank=part) for part in range(rank.tp_size)]


def find_next(rank: RankInfo) -> RankInfo:
    """Return the rank that gets the rows of `rank`; of the last stage, the one that gets its tokens."""
    return msgspec.structs.replace(rank, pp_rank=(rank.pp_rank + 1) % rank.pp_size)


def find_previous(rank: RankInfo) -> RankInfo:
    """Return the rank of which `rank` is the next one."""
    return msgspec.structs.replace(rank, pp_rank=(rank.pp_rank - 1) % rank.pp_size)


def name_process(role: Role, rank: RankInfo) -> str:
    """Return the role, with the number of each part of which there are several: model_dp0_tp1."""
    parts = [(rank.dp_size, f"dp{rank.dp_rank}")]
    if role is Role.MODEL:
        parts += [(rank.pp_size, f"pp{rank.pp_rank}"), (rank.tp_size, f"tp{rank.tp_rank}")]
    return "_".join([role.value, *(part for size, part in parts if size > 1)])
