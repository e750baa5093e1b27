"""Executes steps on a GPU in one of several pipeline stages.

Stages warm up and capture without each other, and meet once all of that is done. From then on each step begins with a
kernel that waits for what the step needs of other stages; the host never does.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from numpy.typing import NDArray

from toka_engine.config import EngineConfig
from toka_engine.messages import Step, Tokens, WorkerReady
from toka_engine.model.backend import Launched
from toka_engine.model.causal import CausalModel
from toka_engine.model.cuda.attention import CudaAttention
from toka_engine.model.cuda.decode_graphs import DecodeGraphs
from toka_engine.model.cuda.gpu_stages import GpuStages, SendingSampler, StagedModel
from toka_engine.model.cuda.runner import CudaLaunched, CudaRunner
from toka_engine.model.cuda.sampler import Sampler
from toka_engine.model.cuda.tensor_parallel import TensorParallel
from toka_engine.model.kernels.decode_attention_short import ShortLaunchConfig
from toka_engine.model.kernels.stage_exchange import begin_step
from toka_engine.model.sample_plan import Sampled, SamplePlan, plan_sampling
from toka_engine.model.slot_grammars import SlotGrammars
from toka_engine.model.slot_state import HostSlots
from toka_engine.model.step_rows import make_layout


class LastStageRunner(CudaRunner):
    """A backend.Runner of the stage that samples."""

    def __init__(
        self,
        model: CausalModel,
        attention: CudaAttention,
        max_seqs: int,
        config: EngineConfig,
        stages: GpuStages,
        parallel: TensorParallel | None = None,
    ) -> None:
        """`stages`: the exchange with the others. See CudaRunner for the rest."""
        self._stages = stages
        super().__init__(StagedModel(model, stages.ports), attention, max_seqs, config, parallel)
        stages.take_over(self._slots)
        self._agree_min = stages.agree_with(self._agree_min)

    def _make_sampler(self, seed: int, max_seqs: int, vocab_size: int) -> Sampler:
        return SendingSampler(super()._make_sampler(seed, max_seqs, vocab_size), self._stages.ports, self._slots)

    def prepare(self, ready: WorkerReady) -> WorkerReady:
        """See backend.Runner. The other stages are waited for, and may wait for this one, from here on."""
        ready = super().prepare(ready)
        self._stages.open()
        return ready

    def _set_up(self, step: Step) -> None:
        begin_step(self._stages.ports, step.number, step.after)
        super()._set_up(step)


class StageRunner(LastStageRunner):
    """A backend.Runner of a stage that hands its rows over: it samples nothing, and its steps have no tokens."""

    def __init__(
        self,
        model: CausalModel,
        attention: CudaAttention,
        max_seqs: int,
        config: EngineConfig,
        stages: GpuStages,
        parallel: TensorParallel | None = None,
    ) -> None:
        """See LastStageRunner."""
        super().__init__(model, attention, max_seqs, config, stages, parallel)
        self.grammars = SlotGrammars(0, model.config.vocab_size)  # none come to this stage
        self._no_samples = plan_sampling(Step(number=0), self.state)

    @torch.inference_mode()
    def launch(self, step: Step) -> Launched:
        """See backend.Runner."""
        started_s, cpu_s = time.monotonic(), time.thread_time()
        self._set_up(step)
        self.attention.copy_pages(step.copy_from, step.copy_to)
        if self._decode_by_graph(step) is None:
            self._forward_rows(step)
        self.state.advance(step)
        done = torch.cuda.Event()
        done.record(self._stream)
        return CudaLaunched(step.number, self._no_samples, None, started_s, time.thread_time() - cpu_s, done)

    def finish(self, launched: Launched) -> Tokens:
        """See backend.Runner. The tokens are the last stage's."""
        if not isinstance(launched, CudaLaunched):
            raise AssertionError("a step of another runner")
        launched.done.synchronize()
        wall_s = time.monotonic() - launched.started_s
        return Tokens(launched.number, np.empty(0, np.int32), step_wall_s=wall_s, host_cpu_s=launched.host_cpu_s)

    def make_decode_graphs(self, max_rows: int | None = None) -> DecodeGraphs:
        """Make graphs, of the forward alone, that are not captured yet."""
        return _RowGraphs(
            self.model,
            self.attention,
            self._slots,
            self.sampler,
            self._max_graph_rows if max_rows is None else max_rows,
        )

    def launch_rest(self) -> None:
        """Launch, once each, the variants of kernels that the warm-up steps do not."""
        self.launch_many_rows(min(self.state.max_seqs, ShortLaunchConfig.of(self.attention.shape.head_dim).most_rows))
        scratch_page = np.array([self.attention.cache.shape[2] - 1], np.int32)
        self.attention.copy_pages(scratch_page, scratch_page)

    def _set_up(self, step: Step) -> None:
        """Without what sampling depends on: attention needs lengths alone."""
        begin_step(self._stages.ports, step.number, step.after)
        self.state.set_up(step)

    def _make_sampler(self, seed: int, max_seqs: int, vocab_size: int) -> Sampler:
        return _NoSampler()

    def _forward_rows(self, step: Step) -> None:
        """Compute and hand over the rows of a step that is no graph."""
        layout = make_layout(step, self.state, keep_seeded_out=False)
        self.attention.plan(layout)
        (tokens,) = self._tokens.upload(step.prefill_tokens)
        self._find_hidden(tokens, layout.decode_slots.size, None)


class _RowGraphs(DecodeGraphs):
    """Graphs of a stage without a head."""

    max_sampled_rows = 0


class _NoSampler:
    """A Sampler of a stage that has nothing to sample."""

    max_whole_rows = 1

    def __call__(
        self, logits: torch.Tensor, logit_rows: torch.Tensor | None, plan: SamplePlan, state: HostSlots
    ) -> Sampled:
        raise AssertionError("the last stage samples")

    def sample_plain(self, logits: torch.Tensor, slots: torch.Tensor, random: torch.Tensor, ids: torch.Tensor) -> None:
        raise AssertionError("the last stage samples")

    def next_random(self) -> NDArray[np.int32]:
        return np.zeros(4, np.int32)

    def widen(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def check(self, ids: NDArray[np.int32]) -> None:
        pass
