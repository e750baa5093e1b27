"""Executes steps on a CPU in a pipeline stage that is not the last one: it samples nothing and hands its rows over."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from toka_engine.messages import Step, Tokens
from toka_engine.model.backend import Launched
from toka_engine.model.causal import CausalModel
from toka_engine.model.cpu.attention import CpuAttention
from toka_engine.model.cpu.stage_exchange import StageExchange
from toka_engine.model.cpu.step_runner import StepRunner
from toka_engine.model.sample_plan import plan_sampling
from toka_engine.model.slot_grammars import SlotGrammars
from toka_engine.model.slot_state import HostSlots
from toka_engine.model.step_rows import make_layout


class StageRunner(StepRunner):
    """A backend.Runner. What it needs of the slots' state is what attention depends on."""

    def __init__(
        self,
        model: CausalModel,
        attention: CpuAttention,
        state: HostSlots,
        exchange: StageExchange,
        check: Callable[[Step], None] | None = None,
    ) -> None:
        """`exchange`: with the stages beside this one. See StepRunner for the others."""
        super().__init__(model, attention, state, check)
        self.grammars = SlotGrammars(0, model.config.vocab_size)  # none come to this stage
        self._exchange = exchange
        self._no_samples = plan_sampling(Step(number=0), state)

    @torch.inference_mode()
    def launch(self, step: Step) -> Launched:
        """See backend.Runner. Waits for the stage before; the first stage for the tokens that `step` goes on with."""
        started_s, cpu_s = time.monotonic(), time.thread_time()
        self._begin(step)
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
