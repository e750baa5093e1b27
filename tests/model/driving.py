"""Drives a worker's runner with hand-made steps: a minimal stand-in for the manager, plain on purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from toka_engine.config import EngineConfig
from toka_engine.messages import Step, Tokens
from toka_engine.model.backend import Launched
from toka_engine.model.cpu.stage_runner import StageRunner
from toka_engine.model.ranks import Ranks
from toka_engine.model.sample_plan import Sampled, SamplePlan
from toka_engine.model.slot_state import HostSlots
from toka_engine.model.stage_links import StageLinks
from toka_engine.model.worker import Worker, load_worker
from toka_engine.slot_parameters import SlotBatch


def load(
    folder: Path,
    ranks: Ranks | None = None,
    links: StageLinks | None = None,
    place: torch.device | None = None,
    **settings: Any,
) -> Worker:
    """A worker on the CPU, in fp32 unless told; one of `ranks` and of the stages of `links`, if given.

    `place`: of several GPUs this one.
    """
    defaults: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "kv_cache_num_tokens": 16384,
        "num_threads": 1,
        "seed": 0,
    }
    config = EngineConfig(**{**defaults, **settings})
    return load_worker(config, folder, lambda phase, detail: None, ranks, place, links)


def ints(*values: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(values, np.int32)


class Driver:
    """Owns the pages of one worker: hands out page numbers upwards and never takes any back."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.page_size = worker.ready.page_size
        self.lengths: dict[int, int] = {}
        self.pages: dict[int, list[int]] = {}
        self._next_page = 0
        self.number = 0
        self._last_sampled = 0
        self.logits = torch.empty(0)
        """The logits that the last step's sampler was given, one row per sampled token, fp32."""
        if not isinstance(worker.runner, StageRunner):
            self._sample = worker.runner.sample
            worker.runner.sample = self._record

    def _record(self, logits: torch.Tensor, rows: torch.Tensor | None, plan: SamplePlan, state: HostSlots) -> Sampled:
        self.logits = (logits if rows is None else logits[rows]).float().clone()
        return self._sample(logits, rows, plan, state)

    def reset(self) -> None:
        self.lengths.clear()
        self.pages.clear()
        self._next_page = 0

    def launch(self, **fields: Any) -> Launched:
        self.number += 1
        step = Step(number=self.number, **{"after": self._last_sampled, **fields})
        if step.decode_slots.size or step.fanout_slots.size:
            self._last_sampled = step.number
        return self.worker.runner.launch(step)

    def run(self, **fields: Any) -> Tokens:
        return self.worker.runner.finish(self.launch(**fields))

    def add_slots(self, slots: list[int], length: int | list[int] = 0, **parameters: Any) -> dict[str, Any]:
        """Fields that set up `slots`, greedy unless told; values are scalars or one per slot."""
        lengths = [length] * len(slots) if isinstance(length, int) else length
        for slot, known in zip(slots, lengths, strict=True):
            self.lengths[slot] = known
            self.pages.setdefault(slot, [])
        return {"new": SlotBatch.of(slots, **{"temperature": 0.0, "length": lengths, **parameters})}

    def grow(self, upto: dict[int, int]) -> dict[str, Any]:
        """Fields that append the pages each slot needs to hold upto[slot] tokens."""
        appended: list[tuple[int, int, int]] = []
        for slot, length in upto.items():
            while len(self.pages[slot]) * self.page_size < length:
                appended.append((slot, len(self.pages[slot]), self._next_page))
                self.pages[slot].append(self._next_page)
                self._next_page += 1
        table = np.array(appended, np.int32).reshape(-1, 3)
        return {"append_slots": table[:, 0], "append_indices": table[:, 1], "append_pages": table[:, 2]}

    def share_pages(self, slot: int, pages: list[int], length: int) -> dict[str, Any]:
        """Fields that begin `slot` with `pages` and append what it needs beyond them to hold `length` tokens."""
        self.pages[slot], self.lengths[slot] = list(pages), length
        own = self.grow({slot: length})
        shared = (np.full(len(pages), slot), np.arange(len(pages)), np.array(pages))
        names = ("append_slots", "append_indices", "append_pages")
        return {
            name: np.concatenate((part, own[name])).astype(np.int32) for name, part in zip(names, shared, strict=True)
        }

    def prefill(self, prompts: dict[int, list[int]], fanout: dict[int, list[int]] | None = None, **new: Any) -> Tokens:
        """Prefill each slot's whole remaining prompt in one step and sample for it, or for its `fanout` slots."""
        starts = {slot: self.lengths.get(slot, 0) for slot in prompts}
        setup = new or self.add_slots(list(prompts))
        pages = self.grow({slot: starts[slot] + len(ids) for slot, ids in prompts.items()})
        fanout = {slot: [slot] for slot in prompts} if fanout is None else fanout
        slots = list(prompts)
        tokens = self.run(
            **setup,
            **pages,
            prefill_slots=ints(*slots),
            prefill_starts=ints(*(starts[slot] for slot in slots)),
            prefill_lengths=ints(*(len(prompts[slot]) for slot in slots)),
            prefill_tokens=ints(*(token for ids in prompts.values() for token in ids)),
            fanout_slots=ints(*(entry for slot in fanout for entry in fanout[slot])),
            fanout_chunks=ints(*(slots.index(slot) for slot in fanout for _ in fanout[slot])),
        )
        for slot, ids in prompts.items():
            self.lengths[slot] = starts[slot] + len(ids)
        return tokens

    def decode(self, slots: list[int], **fields: Any) -> Tokens:
        """One token for each of `slots`."""
        return self.worker.runner.finish(self.launch_decode(slots, **fields))

    def launch_decode(self, slots: list[int], **fields: Any) -> Launched:
        pages = self.grow({slot: self.lengths[slot] + 1 for slot in slots})
        launched = self.launch(**pages, decode_slots=ints(*slots), **fields)
        for slot in slots:
            self.lengths[slot] += 1
        return launched

    def generate(
        self, prompts: list[list[int]], num_tokens: int, first_slot: int = 0, **sampling: Any
    ) -> list[list[int]]:
        """Run all prompts at once; prefill in one step each, decode together. Stages but the last give no tokens."""
        slots = list(range(first_slot, first_slot + len(prompts)))
        outputs: list[list[int]] = []
        setup = self.add_slots(slots, **sampling)
        for index, (slot, ids) in enumerate(zip(slots, prompts, strict=True)):
            new = setup if index == 0 else {"new": SlotBatch()}
            outputs.append(self.prefill({slot: ids}, **new).ids.tolist())
        for _ in range(num_tokens - 1):
            tokens = self.decode(slots).ids.tolist()
            for output, token in zip(outputs, tokens, strict=bool(tokens)):
                output.append(token)
        return outputs
