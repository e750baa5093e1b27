"""The common part of runners on CPUs, whichever pipeline stage they run: no graphs, and how a step begins."""

from __future__ import annotations

from collections.abc import Callable

from toka_engine.messages import Step, WorkerReady
from toka_engine.model.causal import CausalModel
from toka_engine.model.cpu.attention import CpuAttention
from toka_engine.model.slot_state import HostSlots


class StepRunner:
    """The common part of a backend.Runner."""

    max_steps_in_flight = 1

    def __init__(
        self,
        model: CausalModel,
        attention: CpuAttention,
        state: HostSlots,
        check: Callable[[Step], None] | None = None,
    ) -> None:
        """`check` raises where tensor parallel ranks are at different steps."""
        self.model = model
        self.attention = attention
        self.state = state
        self._check = check

    def prepare(self, ready: WorkerReady) -> WorkerReady:
        """Change nothing: sizes are final from the start."""
        return ready

    def capture_graphs(self) -> None:
        """Do nothing: there are no graphs."""

    def _begin(self, step: Step) -> None:
        """Bring the state of the slots, and their pages, to where `step` begins."""
        if self._check is not None:
            self._check(step)
        self.state.set_up(step)
        if step.append_slots.size:
            self.attention.append_pages(step.append_slots, step.append_indices, step.append_pages)
        if step.copy_from.size:
            self.attention.copy_pages(step.copy_from, step.copy_to)
