"""Executes steps on a CPU in a pipeline stage that is not the last one: it samples nothing and hands its rows over."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from toka_engine.messages import Step, Tokens, WorkerReady
from toka_engine.model.backend import Launched
from toka_engine.model.causal import CausalModel
from toka_engine.model.cpu.attention import CpuAttention
from toka_engine.model.cpu.stage_exchange import StageExchange
from toka_engine.model.sample_plan import plan_sampling
from toka_engine.model.slot_grammars import SlotGrammars
from toka_engine.model.slot_state import HostSlots
from toka_engine.model.step_rows import make_layout


class StageRunner:
    """A backend.Runner. What it needs of the slots' state is what attention depends on."""

    max_steps_in_flight = 1

    def __init__(
        self,
        model: CausalModel,
        attention: CpuAttention,
        state: HostSlots,
        exchange: StageExchange,
        check: Callable[[Step], None] | None = None,
    ) -> None:
        """`check` raises where tensor parallel ranks are at different steps."""
        self.model = model
        self.attention = attention
        self.state = state
        self.grammars = SlotGrammars(0, model.config.vocab_size)  # none come to this stage
        self._exchange = exchange
        self._check = check
        self._no_samples = plan_sampling(Step(number=0), state)

    def prepare(self, ready: WorkerReady) -> WorkerReady:
        """Change nothing: sizes are final from the start."""
        return ready

    def capture_graphs(self) -> None:
        """Do nothing: there are no graphs."""

    @torch.inference_mode()
    def launch(self, step: Step) -> Launched:
        """See backend.Runner. Waits for the stage before; the first stage for the tokens that `step` goes on with."""
        started_s, cpu_s = time.monotonic(), time.thread_time()
        if self._check is not None:
            self._check(step)
        self.state.set_up(step)
        if step.append_slots.size:
            self.attention.append_pages(step.append_slots, step.append_indices, step.append_pages)
        if step.copy_from.size:
            self.attention.copy_pages(step.copy_from, step.copy_to)
        self.attention.plan(make_layout(step, self.state, keep_seeded_out=True))
        inputs = self._read_tokens(step) if self._exchange.is_first else self._exchange.receive_rows(step)
        self._exchange.send_rows(step, self.model.forward(inputs, self.attention))
        self.state.advance(step)
        return Launched(step.number, self._no_samples, None, started_s, time.thread_time() - cpu_s)

    def finish(self, launched: Launched) -> Tokens:
        """See backend.Runner. The tokens are the last stage's."""
        wall_s = time.monotonic() - launched.started_s
        empty = np.empty(0, np.int32)
        return Tokens(launched.number, empty, step_wall_s=wall_s, host_cpu_s=launched.host_cpu_s)

    def _read_tokens(self, step: Step) -> torch.Tensor:
        """Return the ids [T] of the step's rows."""
        self._exchange.receive_tokens(step.after, self.state)
        ids = np.concatenate((self.state.last_tokens.numpy()[step.decode_slots], step.prefill_tokens))
        return torch.from_numpy(ids)
