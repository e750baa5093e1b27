"""The messages between the supervisor and its children: start, heartbeat, progress, drain, failure.

Imports nothing of ours but `config` and `messages`, which has their base.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from toka_engine.config import EngineConfig
from toka_engine.messages import Message


class RankInfo(msgspec.Struct, frozen=True, array_like=True):
    """The place of a process among replicas (dp), pipeline stages (pp) and tensor parallel ranks (tp)."""

    dp_rank: int = 0
    pp_rank: int = 0
    tp_rank: int = 0
    dp_size: int = 1
    pp_size: int = 1
    tp_size: int = 1

    @property
    def is_output_rank(self) -> bool:
        """This rank sends the replica's `Tokens`: it is the first one of the last stage."""
        return self.pp_rank == self.pp_size - 1 and self.tp_rank == 0

    @property
    def device_index(self) -> int:
        """Index of the rank's GPU among the visible ones."""
        return (self.dp_rank * self.pp_size + self.pp_rank) * self.tp_size + self.tp_rank


class Start(Message, frozen=True):
    """First message to every child: the settings, where the model's files are, and which process it is."""

    config: EngineConfig
    model_dir: str
    tokenizer_dir: str
    process: str = ""
    """Its name in the topology; "": its role's."""
    rank: RankInfo = RankInfo()
    rendezvous: str = ""
    """The folder of this start where the ranks of a replica find each other; "": each is alone."""


class Ping(Message, frozen=True):
    number: int


class Pong(Message, frozen=True):
    number: int
    busy_s: float
    """Seconds that the main loop has been inside one step; 0 when idle."""
    num_begun: int = 0
    """Steps that a rank has begun since it was ready."""
    num_done: int = 0
    cpu_s: float = 0.0
    """CPU time of the process."""
    memory_bytes: int = 0
    """Memory of its device that it holds: on a CPU what is resident."""


class Progress(Message, frozen=True):
    """The phase of a child that starts (load, warm-up); logged, and passed on to the server for /readyz."""

    phase: str
    detail: str = ""
    process: str = ""
    """Filled in by the supervisor when it passes the message on."""


class Resolved(Message, frozen=True):
    """From the resolving process: the model's files are in these folders now."""

    model_dir: str
    tokenizer_dir: str


class ChildReady(Message, frozen=True):
    """The child serves. The engine is ready when all children are."""

    device: str = ""
    """Type of a rank's device: cpu or cuda."""


class Drain(Message, frozen=True):
    """To the server on SIGTERM: readiness off, finish what runs, then `Drained`."""


class Drained(Message, frozen=True):
    """From the server, after `Drain` or `Failing`: no request is waiting any more."""


class Failing(Message, frozen=True):
    """To the server: another process is dead or stuck. Readiness off, waiting requests get 503 now."""

    process: str
    reason: str


class Unresponsive(Message, frozen=True):
    """To the server: another process has not answered for a moment. Readiness off until `process` is "" again."""

    process: str


class ReplicaLost(Message, frozen=True):
    """To the server: a process of this replica is dead or stuck, and the others go on without it."""

    replica: int
    reason: str


class RankReport(msgspec.Struct, frozen=True, array_like=True):
    """The work of one rank since it was ready, and the memory that it holds."""

    rank: RankInfo
    num_steps: int
    cpu_s: float
    memory_bytes: int


class RankReports(Message, frozen=True):
    """To the server, once a second: all ranks that live."""

    ranks: tuple[RankReport, ...]


class Failed(Message, frozen=True):
    """From a child that ends: its exit message. `exit_code` is of errors.ExitCode."""

    exit_code: int
    message: str
    is_consequence: bool = False
    """It ends because another process went away, which is the one to blame."""


ToChild: TypeAlias = Start | Ping | Progress | Drain | Unresponsive | Failing | ReplicaLost | RankReports
FromChild: TypeAlias = Pong | Progress | Resolved | ChildReady | Drained | Failed
