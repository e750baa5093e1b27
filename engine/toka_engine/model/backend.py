"""The interface of a device: a `Backend` has the operators of its models and makes the `Runner` that executes steps.

`cpu.backend` and `cuda.backend` implement it; `torch_compile` wraps either. `devices` chooses one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from toka_engine.config import EngineConfig
from toka_engine.messages import Step, Tokens, WorkerReady
from toka_engine.model.attention_backend import AttentionBackend, AttentionShape
from toka_engine.model.causal import CausalModel
from toka_engine.model.model_config import ModelConfig
from toka_engine.model.ops import Ops
from toka_engine.model.prompt_scores import PromptScores
from toka_engine.model.sample_plan import Sampled, SamplePlan
from toka_engine.model.sizing import Sizes
from toka_engine.model.slot_grammars import SlotGrammars


@dataclass(frozen=True, slots=True)
class Launched:
    """A step whose tokens may still be on the device."""

    number: int
    plan: SamplePlan
    sampled: Sampled | None
    """None: the step sampled nothing."""
    started_s: float
    host_cpu_s: float
    scores: PromptScores | None = field(default=None, kw_only=True)
    """Logprobs of the prompts that it prefills; None: nobody asks for any."""


class Runner(Protocol):
    """Executes steps in order on one device: slots, pages, forward, sampling. Knows no sockets and no files.

    `launch` starts a step and `finish` waits for its tokens, so that a device with a queue can have several in flight.
    """

    model: CausalModel
    grammars: SlotGrammars

    @property
    def attention(self) -> AttentionBackend: ...

    @property
    def max_steps_in_flight(self) -> int:
        """Steps that may be launched before the first one's tokens are on the host."""
        ...

    def launch(self, step: Step) -> Launched:
        """Apply `step` and start its forward and sampling."""
        ...

    def finish(self, launched: Launched) -> Tokens:
        """Wait for the tokens of `launched`."""
        ...

    def prepare(self, ready: WorkerReady) -> WorkerReady:
        """Settle the device's memory after the warm-up steps, and return the final sizes. Nothing compiles afterwards.

        Raises OutOfMemoryError.
        """
        ...

    def capture_graphs(self) -> None:
        """Capture CUDA graphs anew, where the device has some, because what they hold has changed."""
        ...


class Backend(Protocol):
    """One device's implementation of all that is device-specific."""

    @property
    def ops(self) -> Ops: ...

    @property
    def has_packed_linears(self) -> bool:
        """Whether linear layers hold their weights in a packed form that torch.compile cannot look into."""
        ...

    def choose_sizes(self, config: EngineConfig, model: ModelConfig, shape: AttentionShape) -> Sizes:
        """Choose the sizes to start with, once the weights are loaded. Raises ConfigError, OutOfMemoryError."""
        ...

    def make_runner(self, model: CausalModel, shape: AttentionShape, sizes: Sizes, config: EngineConfig) -> Runner:
        """Allocate the KV cache and the slots' state, and make what executes steps."""
        ...
