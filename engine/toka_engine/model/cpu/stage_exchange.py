"""Rows and tokens on their way between pipeline stages on CPUs: rows through memory that two ranks share.

The rank that reads makes the memory and passes its descriptor back, so the rank before it writes rows where they are
read. There is a place for each step that can be on its way: a step is sent only when one as many steps before it has
left the last stage, so no place is written that has not been read.

Tensor parallel ranks of a stage all hold the same rows. The first one hands them over; the others begin with zeros, and
the first norm adds up the parts, as behind an embedding.
"""

from __future__ import annotations

import mmap
import os
import socket

import torch

from toka_engine.config import EngineConfig
from toka_engine.errors import PeerClosedError, RanksDisagreeError
from toka_engine.messages import Int32s, Step
from toka_engine.model.model_config import ModelConfig
from toka_engine.model.sizing import choose_step_sizes
from toka_engine.model.slot_state import HostSlots
from toka_engine.model.stage_links import LastTokens, Rows, StageLinks
from toka_engine.portable import make_shared_memory
from toka_engine.topology import Role, name_process

_MIN_PLACES = 4
"""More than the steps of the warm-up, which all run without waiting for tokens."""


class StageExchange:
    """The exchange of one rank with the stages beside it."""

    def __init__(self, links: StageLinks, num_places: int, max_rows: int, width: int, dtype: torch.dtype) -> None:
        """Share memory with the neighbours, for `max_rows` rows of `width` of each of `num_places` steps.

        All ranks give the same sizes, before their first message. Raises PeerClosedError.
        """
        self.links, rank = links, links.rank
        self.is_first, self.is_last = rank.pp_rank == 0, rank.pp_rank == rank.pp_size - 1
        self._shape, self._dtype = (num_places, max_rows, width), dtype
        self._num_received = self._num_sent = 0
        self._newest = 0
        """The last step whose tokens are here."""
        self._is_carrier = rank.tp_rank == 0
        self._source = self._share() if self._is_carrier and not self.is_first else None
        self._target = self._open() if self._is_carrier and not self.is_last else None

    @classmethod
    def connect(cls, links: StageLinks, config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> StageExchange:
        """Share memory for the steps of `model` that can be on their way. See `__init__`."""
        num_places = max(_MIN_PLACES, config.choose_steps_ahead(is_cpu=True))
        _, max_rows = choose_step_sizes(config, is_gpu=False)
        return cls(links, num_places, max_rows, model.hidden_size, dtype)

    def receive_rows(self, step: Step) -> torch.Tensor:
        """Wait for the rows [T, width] of `step`; they may be changed. Raises RanksDisagreeError, PeerClosedError."""
        found, own = self.links.receive(Rows), _describe(step)
        if found != own:
            name = name_process(Role.MODEL, self.links.rank)
            raise RanksDisagreeError(
                f"the ranks disagree on a step: {self.links.previous_name} has {_to_text(found)}, "
                f"{name} has {_to_text(own)}"
            )
        num_rows = own.num_decode_rows + own.num_prefill_tokens
        if self._source is None:
            return torch.zeros((num_rows, self._shape[2]), dtype=self._dtype)
        place = self._num_received % self._shape[0]
        self._num_received += 1
        return self._source[place, :num_rows]

    def send_rows(self, step: Step, rows: torch.Tensor) -> None:
        """Hand over the rows [T, width] of `step`. Raises PeerClosedError."""
        if self._target is not None:
            self._target[self._num_sent % self._shape[0], : rows.shape[0]] = rows
            self._num_sent += 1
        self.links.send(_describe(step))

    def send_tokens(self, number: int, slots: Int32s, ids: torch.Tensor) -> None:
        """Give the first stage the tokens [n] int32 that step `number` has sampled for `slots` [n]."""
        self.links.send(LastTokens(number, slots, ids.numpy()))

    def receive_tokens(self, until: int, state: HostSlots) -> None:
        """Wait until the tokens of step `until` and of those before it are in `last_tokens` of the state.

        Takes what else is here: steps without decode rows wait for nothing, however many there are.
        """
        while self._newest < until or self.links.has_arrived():
            found = self.links.receive(LastTokens)
            state.last_tokens.numpy()[found.slots] = found.ids
            self._newest = found.number

    def _share(self) -> torch.Tensor:
        fd = make_shared_memory(self._num_bytes)
        previous, _ = self.links.sockets
        try:
            socket.send_fds(previous, [b"m"], [fd])
        except OSError as error:
            raise PeerClosedError("the stage before is gone") from error
        return self._map(fd)

    def _open(self) -> torch.Tensor:
        _, following = self.links.sockets
        following.setblocking(True)
        try:
            _, fds, _, _ = socket.recv_fds(following, 1, 1)
        except OSError as error:
            raise PeerClosedError("the stage behind is gone") from error
        finally:
            following.setblocking(False)
        if not fds:
            raise PeerClosedError("the stage behind is gone")
        return self._map(fds[0])

    def _map(self, fd: int) -> torch.Tensor:
        """Take over `fd`: memory as [places, rows, width]."""
        if os.fstat(fd).st_size != self._num_bytes:
            raise RanksDisagreeError(f"the ranks disagree on the memory between stages: {self._num_bytes} bytes here")
        memory = mmap.mmap(fd, self._num_bytes)
        os.close(fd)
        return torch.frombuffer(memory, dtype=torch.uint8).view(self._dtype).view(self._shape)

    @property
    def _num_bytes(self) -> int:
        places, rows, width = self._shape
        return places * rows * width * self._dtype.itemsize


def _describe(step: Step) -> Rows:
    num_samples = step.decode_slots.size + step.fanout_slots.size
    return Rows(step.number, step.decode_slots.size, step.prefill_tokens.size, num_samples)


def _to_text(rows: Rows) -> str:
    return (
        f"number={rows.number} decode_rows={rows.num_decode_rows} prefill_tokens={rows.num_prefill_tokens} "
        f"samples={rows.num_samples}"
    )
