"""What the worker keeps for each slot: the last sampled token, the length, and how to sample.

Device tensors are allocated once and written by slot; the host keeps mirrors of everything but the tokens, so that a
step's layout and the rows that ask for special sampling are known without asking the device. On a CPU the mirrors and
the tensors are the same memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from toka_engine.messages import Step

_PARAMETERS: dict[str, tuple[Any, str]] = {
    "temperatures": (np.float32, "new_temperatures"),
    "top_ps": (np.float32, "new_top_ps"),
    "top_ks": (np.int32, "new_top_ks"),
    "min_ps": (np.float32, "new_min_ps"),
    "seeds": (np.int64, "new_seeds"),
    "num_sampled": (np.int32, "new_num_sampled"),
    "lengths": (np.int32, "new_lengths"),
}
"""Field -> dtype and the array of Step that sets it."""


class HostSlots:
    """The host's mirror: one numpy array [max_seqs] per field."""

    def __init__(self, max_seqs: int) -> None:
        self.temperatures: NDArray[np.float32] = np.zeros(max_seqs, np.float32)
        self.top_ps: NDArray[np.float32] = np.ones(max_seqs, np.float32)
        self.top_ks: NDArray[np.int32] = np.zeros(max_seqs, np.int32)
        self.min_ps: NDArray[np.float32] = np.zeros(max_seqs, np.float32)
        self.seeds: NDArray[np.int64] = np.full(max_seqs, -1, np.int64)
        self.num_sampled: NDArray[np.int32] = np.zeros(max_seqs, np.int32)
        self.lengths: NDArray[np.int32] = np.zeros(max_seqs, np.int32)
        self.num_logprobs: NDArray[np.int32] = np.full(max_seqs, -1, np.int32)
        self.is_filtered: NDArray[np.bool_] = np.zeros(max_seqs, np.bool_)
        self.has_penalties: NDArray[np.bool_] = np.zeros(max_seqs, np.bool_)
        # Valid where has_penalties.
        self.presence_penalties: NDArray[np.float32] = np.zeros(max_seqs, np.float32)
        self.frequency_penalties: NDArray[np.float32] = np.zeros(max_seqs, np.float32)
        self.repetition_penalties: NDArray[np.float32] = np.ones(max_seqs, np.float32)


class SlotState:
    """State by slot on the device, [max_seqs] each, and `host`, its mirror."""

    last_tokens: torch.Tensor  # int32; 0 where a row's logits were not finite
    temperatures: torch.Tensor  # float32; 0: greedy
    top_ps: torch.Tensor  # float32
    top_ks: torch.Tensor  # int32; 0: off
    min_ps: torch.Tensor  # float32
    seeds: torch.Tensor  # int64; -1: none
    num_sampled: torch.Tensor  # int32: output tokens so far, the counter of seeded draws
    lengths: torch.Tensor  # int32: tokens whose keys and values are in the pages

    def __init__(self, max_seqs: int, device: torch.device) -> None:
        self.host = HostSlots(max_seqs)
        self.device = device
        self.max_seqs = max_seqs
        self.last_tokens = torch.zeros(max_seqs, dtype=torch.int32, device=device)
        for name in _PARAMETERS:
            tensor = torch.from_numpy(getattr(self.host, name))
            setattr(self, name, tensor if device.type == "cpu" else tensor.to(device))

    def set_up(self, step: Step) -> None:
        """Take over the new slots of `step`."""
        slots = step.new_slots
        if not slots.size:
            return
        host = self.host
        for name, (_, field) in _PARAMETERS.items():
            getattr(host, name)[slots] = getattr(step, field)
        host.num_logprobs[slots] = step.new_num_logprobs
        host.is_filtered[slots] = ((step.new_top_ps < 1.0) | (step.new_top_ks > 0) | (step.new_min_ps > 0.0)) & (
            step.new_temperatures > 0.0
        )
        host.has_penalties[slots] = False
        if step.penalty_slots.size:
            asking = step.penalty_slots
            host.has_penalties[asking] = True
            host.presence_penalties[asking] = step.presence_penalties
            host.frequency_penalties[asking] = step.frequency_penalties
            host.repetition_penalties[asking] = step.repetition_penalties
        self._upload(slots, tuple(_PARAMETERS))

    def advance(self, step: Step) -> None:
        """Count what the forward of `step` wrote and what it sampled. The sampler writes `last_tokens`."""
        host = self.host
        host.lengths[step.decode_slots] += 1
        if self.device.type == "cpu" and not step.prefill_slots.size:  # mirrors are all there is to change
            host.num_sampled[step.decode_slots] += 1
            return
        host.lengths[step.prefill_slots] += step.prefill_lengths
        host.lengths[step.fanout_slots] = host.lengths[step.prefill_slots[step.fanout_chunks]]
        sampled = np.concatenate((step.decode_slots, step.fanout_slots))
        host.num_sampled[sampled] += 1
        self._upload(np.concatenate((sampled, step.prefill_slots)), ("lengths", "num_sampled"))

    def _upload(self, slots: NDArray[np.int32], names: tuple[str, ...]) -> None:
        if self.device.type == "cpu" or not slots.size:
            return
        index = torch.from_numpy(slots.astype(np.int64)).to(self.device)
        for name in names:
            values = torch.from_numpy(getattr(self.host, name)[slots]).to(self.device)
            getattr(self, name).index_copy_(0, index, values)
