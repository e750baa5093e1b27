"""Pipeline stages on the GPUs of one host: what they share, and the model and the sampler of one of them.

A stage's model takes its rows from the stage before and hands them to the one behind, so neither the runner nor the
decode graphs know where rows come from. The stages of equal tensor parallel ranks have each other's memory open; rows
are handed over by the first ranks alone, and the norm behind adds the others' zeros to them, as with an embedding.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from toka_engine.config import EngineConfig
from toka_engine.errors import ConfigError, DeviceUnavailableError
from toka_engine.model.attention_backend import AttentionBackend
from toka_engine.model.causal import CausalModel
from toka_engine.model.cuda.gpu_ranks import NO_PEER_MEMORY
from toka_engine.model.cuda.peer_memory import PeerMemory, PeerMemoryError
from toka_engine.model.cuda.sampler import Sampler
from toka_engine.model.cuda.staging import Staging
from toka_engine.model.kernels.device_slots import DeviceSlots
from toka_engine.model.kernels.peer_pattern import PATTERN_WORDS
from toka_engine.model.kernels.stage_exchange import FLAG_WORDS, StagePorts, put_rows, send_tokens, take_rows
from toka_engine.model.model_config import ModelConfig
from toka_engine.model.sample_plan import Sampled, SamplePlan
from toka_engine.model.sizing import choose_step_sizes
from toka_engine.model.slot_state import HostSlots
from toka_engine.model.stage_links import StageLinks

_ALIGN = 256


@dataclass(frozen=True, slots=True)
class RegionPlan:
    """The bytes at which the parts of a rank's region begin; those of all ranks have the same ones."""

    flags: int
    tokens: int
    places: int
    place_bytes: int
    num_places: int

    @classmethod
    def of(cls, num_stages: int, num_slots: int, num_places: int, max_rows: int, width: int) -> RegionPlan:
        """The pattern that verifies the memory comes first."""
        flags = _align(4 * num_stages * PATTERN_WORDS)
        tokens = flags + _align(4 * FLAG_WORDS)
        places = tokens + _align(4 * num_slots)
        return cls(flags, tokens, places, _align(2 * max_rows * width), num_places)

    def count_bytes(self, has_places: bool) -> int:
        """The size of a region."""
        return self.places + (self.num_places * self.place_bytes if has_places else 0)


class GpuStages:
    """One rank's end of the exchange between stages. Its memory lives as long as the process."""

    def __init__(self, links: StageLinks, ports: StagePorts, tokens: torch.Tensor) -> None:
        """`tokens` [max_seqs + 1] int32: where the last stage stores the first one's last tokens."""
        self.links, self.ports, self._tokens = links, ports, tokens

    def open(self) -> None:
        """Wait for the other stages from now on, and hand rows over."""
        self.ports.state[0] = 1
        torch.cuda.synchronize()

    def agree_with(self, agree_min: Callable[[int], int]) -> Callable[[int], int]:
        """Return what gives the smallest value of all stages' ranks; `agree_min` gives that of this stage's."""
        return lambda value: self.links.agree_min(agree_min(value))

    def take_over(self, slots: DeviceSlots) -> None:
        """Have the first stage read last tokens where the last one stores them. Before anything is captured."""
        if self.ports.is_first:
            slots.last_token = self._tokens


def connect_stages(links: StageLinks, config: EngineConfig, model: ModelConfig) -> GpuStages:
    """Share memory with the other stages, on the current device. Raises ConfigError, DeviceUnavailableError,
    PeerClosedError.
    """
    if model.hidden_size % 2:
        raise ConfigError(
            f"pp_size={config.pp_size} needs an even hidden_size on GPUs, the model has {model.hidden_size}"
        )
    try:
        if links.agree_min(int(NO_PEER_MEMORY not in os.environ)) == 0:
            raise PeerMemoryError(f"{NO_PEER_MEMORY} is set")
        return _connect(links, config, model)
    except PeerMemoryError as error:  # on every rank, if on one
        raise DeviceUnavailableError(
            f"pp_size={config.pp_size} needs GPUs that reach each other's memory: {error}"
        ) from error


def _connect(links: StageLinks, config: EngineConfig, model: ModelConfig) -> GpuStages:
    rank, num_stages = links.rank, links.rank.pp_size
    max_seqs, max_tokens = choose_step_sizes(config, is_gpu=True)
    max_rows, num_places, width = max(max_seqs, max_tokens), config.num_lanes, model.hidden_size
    plan = RegionPlan.of(num_stages, max_seqs + 1, num_places, max_rows, width)
    has_rows, is_first = rank.tp_rank == 0, rank.pp_rank == 0
    has_places = has_rows and not is_first
    memory = PeerMemory.open_verified(rank.pp_rank, num_stages, plan.count_bytes(has_places), links.gather)
    words = memory.view(torch.int32)
    words.zero_()
    torch.cuda.synchronize()
    links.gather(b"")  # nobody stores before all regions are empty
    regions = memory.addresses.tolist()
    before, behind = regions[rank.pp_rank - 1], regions[(rank.pp_rank + 1) % num_stages]
    addresses = before + plan.flags, behind + plan.flags, behind + plan.places, regions[0] + plan.flags
    ports = StagePorts(
        is_first=is_first,
        is_last=rank.pp_rank == num_stages - 1,
        has_rows=has_rows,
        num_places=num_places,
        max_rows=max_rows,
        width=width,
        state=torch.zeros(3, dtype=torch.int64, device="cuda"),
        flags=words[plan.flags // 4 : plan.flags // 4 + FLAG_WORDS],
        places=words[plan.places // 4 :].view(torch.bfloat16) if has_places else None,
        addresses=torch.tensor([*addresses, regions[0] + plan.tokens], dtype=torch.int64, device="cuda"),
        place_words=plan.place_bytes // 4,
    )
    return GpuStages(links, ports, words[plan.tokens // 4 : plan.tokens // 4 + max_seqs + 1])


class StagedModel:
    """A causal.CausalModel whose rows come from the stage before, if any, and go to the stage behind, if any."""

    def __init__(self, model: CausalModel, ports: StagePorts) -> None:
        self.config = model.config
        self._model, self._ports = model, ports

    def forward(
        self, inputs: torch.Tensor, attention: AttentionBackend, wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See causal.CausalModel. `inputs` are the ids [T] of the rows in every stage."""
        ports = self._ports
        rows = inputs if ports.is_first else take_rows(ports, inputs.shape[0])
        if ports.is_last:
            return self._model.forward(rows, attention, wanted)
        rows = self._model.forward(rows, attention)
        put_rows(ports, rows)
        return rows

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See causal.CausalModel."""
        return self._model.logits(hidden)


class SendingSampler:
    """A Sampler of the last stage, which gives the first one every token that it samples."""

    def __init__(self, sampler: Sampler, ports: StagePorts, slots: DeviceSlots) -> None:
        self._sampler, self._ports, self._slots = sampler, ports, slots
        self._inputs = Staging(slots.last_token.device)

    def __call__(
        self, logits: torch.Tensor, logit_rows: torch.Tensor | None, plan: SamplePlan, state: HostSlots
    ) -> Sampled:
        """See sample_plan.Sample."""
        sampled = self._sampler(logits, logit_rows, plan, state)
        (slots,) = self._inputs.upload(plan.slots)
        send_tokens(self._ports, slots, self._slots.last_token)
        return sampled

    def next_random(self) -> NDArray[np.int32]:
        """See Sampler."""
        return self._sampler.next_random()

    def sample_plain(self, logits: torch.Tensor, slots: torch.Tensor, random: torch.Tensor, ids: torch.Tensor) -> None:
        """See Sampler."""
        self._sampler.sample_plain(logits, slots, random, ids)
        send_tokens(self._ports, slots, self._slots.last_token)

    @property
    def max_whole_rows(self) -> int:
        """See Sampler."""
        return self._sampler.max_whole_rows

    def widen(self, logits: torch.Tensor) -> torch.Tensor:
        """See Sampler."""
        return self._sampler.widen(logits)

    def check(self, ids: NDArray[np.int32]) -> None:
        """See Sampler."""
        self._sampler.check(ids)


def _align(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
