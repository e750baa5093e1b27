"""The links of a rank to the ranks before and behind it in a pipeline: what is small enough for a socket.

Ranks that hold equal parts of the stages form a ring of socket pairs, which the supervisor has made: nobody listens.
Messages go forward, and those of the last stage to the first. Each stage executes all steps in order and waits only
for what a lower step or a stage before it sends, so the ring never waits for itself.

A stage notices at once that a neighbour has ended; one that is stuck is the supervisor's business.
"""

from __future__ import annotations

import socket
from collections import deque
from typing import TypeAlias, TypeVar

import msgspec

from toka_engine.channel import Channel, wait
from toka_engine.control_messages import RankInfo
from toka_engine.errors import PeerClosedError, RanksDisagreeError
from toka_engine.messages import Int32s, Message
from toka_engine.topology import Role, find_previous, name_process


class Rows(Message, frozen=True):
    """The rows of a step are where the next stage reads them."""

    number: int
    num_decode_rows: int
    num_prefill_tokens: int
    num_samples: int


class LastTokens(Message, frozen=True):
    """From the last stage to the first: the tokens that step `number` sampled, of which the next ones follow."""

    number: int
    slots: Int32s
    ids: Int32s


class Smallest(Message, frozen=True):
    """The smallest value of the stages so far."""

    value: int


class Share(Message, frozen=True):
    """Bytes of one stage, on their way to all others."""

    data: bytes


class Untaken(Message, frozen=True):
    """The tensors that none of the stages so far has asked for."""

    names: tuple[str, ...]


StageMessage: TypeAlias = Rows | LastTokens | Smallest | Share | Untaken
M = TypeVar("M", bound=msgspec.Struct)


class StageLinks:
    """The two links of one rank."""

    def __init__(self, rank: RankInfo, previous: socket.socket, following: socket.socket) -> None:
        """`previous` leads to the rank before this one, `following` to the one behind it, in the ring."""
        self.rank = rank
        self.previous_name = name_process(Role.MODEL, find_previous(rank))
        self.sockets = previous, following
        """For what the device of the ranks shares before the first message."""
        self._previous: Channel[StageMessage] = Channel(previous, StageMessage)
        self.following: Channel[StageMessage] = Channel(following, StageMessage)
        self._arrived: deque[StageMessage] = deque()

    @classmethod
    def from_fds(cls, rank: RankInfo, previous: int, following: int) -> StageLinks:
        """Take over inherited file descriptors."""
        return cls(rank, socket.socket(fileno=previous), socket.socket(fileno=following))

    def send(self, message: StageMessage) -> None:
        """Send to the next stage, without waiting for it. Raises PeerClosedError."""
        self.following.send(message)

    def receive(self, kind: type[M]) -> M:
        """Wait for a message of the stage before, which is of `kind`. Raises PeerClosedError, RanksDisagreeError."""
        while not self._arrived:
            self._wait()
        message = self._arrived.popleft()
        if not isinstance(message, kind):
            raise RanksDisagreeError(
                f"the ranks disagree on a step: {self.previous_name} has sent {type(message).__name__}, "
                f"{name_process(Role.MODEL, self.rank)} waits for {kind.__name__}"
            )
        return message

    def has_arrived(self) -> bool:
        """Whether a message of the stage before is here already. Raises PeerClosedError."""
        if not self._arrived:
            self._arrived.extend(self._previous.receive_ready())
        return bool(self._arrived)

    def agree_min(self, value: int) -> int:
        """Return the smallest of all stages' values; each of them asks."""
        if self.rank.pp_rank == 0:
            self.send(Smallest(value))
            value = self.receive(Smallest).value
            self.send(Smallest(value))
            self.receive(Smallest)
            return value
        self.send(Smallest(min(value, self.receive(Smallest).value)))
        value = self.receive(Smallest).value
        self.send(Smallest(value))
        return value

    def gather(self, data: bytes) -> list[bytes]:
        """Return every stage's `data`, in order, once all have called it."""
        index, num_stages = self.rank.pp_rank, self.rank.pp_size
        every = [data] * num_stages
        for distance in range(1, num_stages):
            self.send(Share(data))
            every[index - distance] = data = self.receive(Share).data
        return every

    def find_untaken(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return, in the last stage, the names that are among those of every stage; in the others, none."""
        if self.rank.pp_rank > 0:
            before = set(self.receive(Untaken).names)
            names = tuple(name for name in names if name in before)
        if self.rank.pp_rank == self.rank.pp_size - 1:
            return names
        self.send(Untaken(names))
        return ()

    def _wait(self) -> None:
        for channel in wait([self._previous, self.following], None):
            messages = channel.receive_ready()
            if channel is self.following and messages:
                raise PeerClosedError("a stage has sent backwards")
            self._arrived.extend(messages)
