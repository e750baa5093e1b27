"""A dry run of an engine's start on a GPU, without one: it launches the same kernels on torch's device `meta`.

Tensors of that device have a shape, a dtype and an address's alignment, which is all that Triton needs to choose a
kernel's variant, and no memory. The model, the attention, the sampler and the steps are the engine's own. Only
flashinfer's kernels and the copies to the host are left out. The caller decides what a launch does and for which GPU
(Triton's active driver, see `triton_build`): nothing here may compile, or touch a device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from triton.runtime import driver

from toka_engine.config import EngineConfig
from toka_engine.messages import Step, WorkerReady
from toka_engine.model.architectures.registry import build_model
from toka_engine.model.attention_backend import AttentionShape
from toka_engine.model.backend import Launched
from toka_engine.model.cuda.attention import CudaAttention
from toka_engine.model.cuda.backend import make_ops
from toka_engine.model.cuda.grammar_rows import GrammarRows
from toka_engine.model.cuda.memory_fit import make_largest_steps
from toka_engine.model.cuda.peer_links import LinkSizes, find_begins, make_links
from toka_engine.model.cuda.runner import CudaRunner
from toka_engine.model.cuda.tensor_parallel import PeerParallel
from toka_engine.model.kernels import FP8_CAPABILITY
from toka_engine.model.kernels.chunk_sum import NUM_TURNS, Boxes, sum_add_rms_norm
from toka_engine.model.kernels.decode_attention_short import ShortLaunchConfig
from toka_engine.model.kernels.peer_pattern import write_pattern
from toka_engine.model.kernels.stage_exchange import (
    FLAG_WORDS,
    StagePorts,
    begin_step,
    put_rows,
    send_tokens,
    take_rows,
)
from toka_engine.model.loader import Weights
from toka_engine.model.model_config import ModelConfig
from toka_engine.model.prompt_scores import PromptScores
from toka_engine.model.quantization import E4M3, QuantisedWeight
from toka_engine.model.sample_plan import Sampled, SamplePlan
from toka_engine.model.sharding import Shard, Sharding
from toka_engine.model.sizing import Sizes, choose_cache_dtype, choose_fp8
from toka_engine.model.slot_grammars import SlotGrammars
from toka_engine.model.worker import describe, make_warm_up_steps

_META = torch.device("meta")
_SIZES = Sizes(num_pages=64, page_size=0, max_seqs=40, max_tokens_per_forward=96, max_pages_per_seq=64)
"""Small sizes that still reach all code: no variant of a kernel may depend on them."""
_CONFIG = EngineConfig(seed=0)


class _Weights(Weights):
    """Tensors of any name and shape; the weights of linear layers as 8-bit floats if it `computes_fp8`."""

    def __init__(self, computes_fp8: bool) -> None:
        super().__init__(Path(), _META, torch.bfloat16, 0, computes_fp8=computes_fp8)

    def is_quantised(self, name: str) -> bool:
        return self._computes_fp8

    def take_quantised(self, name: str, shape: tuple[int, int], shard: Shard | None = None) -> QuantisedWeight:
        return QuantisedWeight(self.take(name, shape, shard).to(E4M3), self.take(name, shape, shard)[:, 0].float())

    def take(self, name: str, shape: tuple[int, ...], shard: Shard | None = None) -> torch.Tensor:
        return torch.empty(shape if shard is None else shard.cut(shape), dtype=self.dtype, device=self.device)


@dataclass(frozen=True, slots=True)
class DryRanks:
    """A ranks.Ranks whose others are not there: kernels that exchange with them are launched, and nothing comes."""

    rank: int
    size: int
    has_stages: bool = False
    """Whether they are of one of several pipeline stages."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x`."""
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x` once for each rank."""
        return x.expand(self.size, *x.shape)

    def agree_min(self, value: int) -> int:
        """Return `value`."""
        return value

    def connect(self, model: ModelConfig, sizes: Sizes, capability: int) -> PeerParallel | None:
        """Make what cuda.gpu_ranks.GpuRanks makes, with peer memory that has no bytes."""
        if self.size == 1:
            return None
        sharding = Sharding(self.rank, self.size)
        link_sizes = LinkSizes(model.hidden_size, _MAX_ROWS, sizes.max_seqs, model.vocab_size)
        begins = find_begins(self.size, link_sizes)
        addresses = torch.zeros(self.size, dtype=torch.int64, device=_META)
        region = torch.zeros(begins[-1] // 4, device=_META)
        begin, end = sharding.split_vocabulary(model.vocab_size)
        links = make_links(sharding, link_sizes, capability, _MAX_PROGRAMS, addresses, begins, region)
        return PeerParallel(links, end - begin, self.agree_min)


ALONE = DryRanks(0, 1)
_MAX_PROGRAMS, _MAX_ROWS = 2, 1 << 14


class _OpenRows(GrammarRows):
    """Rows that follow a grammar which allows everything."""

    def __init__(self, grammars: SlotGrammars, max_seqs: int) -> None:
        self._words = np.full((max_seqs, grammars.num_words), -1, np.int32)

    def fill_masks(self, plan: SamplePlan) -> SamplePlan:
        return replace(plan, masks=self._words[: plan.grammatical.size])


class DryRunner(CudaRunner):
    """A CudaRunner whose results stay where they are."""

    def _reserve_outputs(self, device: torch.device, max_seqs: int) -> None:
        self._grammar_rows = _OpenRows(self.grammars, max_seqs)

    def _fetch(
        self,
        step: Step,
        plan: SamplePlan,
        sampled: Sampled | None,
        scores: PromptScores | None,
        started_s: float,
        cpu_s: float,
    ) -> Launched:
        return Launched(step.number, plan, sampled, started_s, 0.0, scores=scores)


def make_runner(
    model: ModelConfig,
    page_size: int,
    ranks: DryRanks = ALONE,
    config: EngineConfig = _CONFIG,
    sizes: Sizes = _SIZES,
) -> tuple[DryRunner, WorkerReady]:
    """Make the runner of this model, or of a rank's part, with the settings of `config`, and its worker's report.

    `sizes`: other than the page size.
    """
    sizes, capability = replace(sizes, page_size=page_size), driver.active.get_current_target().arch
    has_fp8 = capability >= FP8_CAPABILITY
    cache_dtype = choose_cache_dtype(config, has_fp8, torch.bfloat16)
    sharding = Sharding(ranks.rank, ranks.size)
    shape = AttentionShape.of(model, torch.bfloat16, _META, sharding, cache_dtype=cache_dtype)
    parallel = ranks.connect(model, sizes, capability)
    attention = CudaAttention(shape, kernels=_without_kernels())
    attention.allocate(sizes.num_pages, page_size, sizes.max_seqs, sizes.max_pages_per_seq)
    ops = make_ops(capability, parallel)
    if not (computes_fp8 := choose_fp8(config, model, has_fp8, torch.bfloat16)):
        ops = replace(ops, fp8=None)
    with torch.inference_mode():
        runner = DryRunner(
            build_model(model, _Weights(computes_fp8), ops, ranks),
            attention, sizes.max_seqs, config, parallel,
        )  # fmt: skip
    return runner, describe(model, sizes, shape)


@torch.inference_mode()
def dry_run(
    model: ModelConfig,
    page_size: int,
    ranks: DryRanks = ALONE,
    config: EngineConfig = _CONFIG,
    sizes: Sizes = _SIZES,
) -> None:
    """Launch the kernels that an engine's start with this model launches: see worker.Worker.warm_up."""
    runner, ready = make_runner(model, page_size, ranks, config, sizes)
    if ranks.has_stages:
        hand_over(model, sizes)
    if ranks.size > 1:
        write_pattern(torch.zeros(ranks.size, dtype=torch.int64, device=_META), ranks.rank)
        add_up(ranks, model.hidden_size, model.rms_norm_eps)
    for step in (*make_warm_up_steps(ready), *make_largest_steps(ready)):
        runner.launch(step)
    runner.launch_rest()
    decode_graphs = runner.make_decode_graphs()
    for size in (1, 2, decode_graphs.max_rows):
        decode_graphs.launch(size)
    runner.launch_many_rows(
        ShortLaunchConfig.of(model.head_dim).most_rows
    )  # an image has them for engines of any slots


def add_up(ranks: DryRanks, width: int, eps: float) -> None:
    """Launch the kernel that adds up what ranks exchange while a GEMM runs: only steps of many rows do."""
    words = torch.zeros(NUM_TURNS, ranks.size - 1, _MAX_ROWS, width // 2, dtype=torch.int32, device=_META)
    boxes = Boxes(ranks.rank, ranks.size, _MAX_ROWS, width, (), words)
    part, weight = (torch.zeros(*shape, width, dtype=torch.bfloat16, device=_META) for shape in ((2,), ()))
    sum_add_rms_norm(part, part, weight, eps, boxes, turn=1, first_row=0, out=part)


def hand_over(model: ModelConfig, sizes: Sizes) -> None:
    """Launch the kernels by which pipeline stages of this model exchange rows and tokens, as each of them does."""
    num_slots, place_words = sizes.max_seqs + 1, _MAX_ROWS * model.hidden_size // 2

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=_META)

    write_pattern(zeros(2, dtype=torch.int64), 0)
    for is_first, is_last in ((True, False), (False, False), (False, True)):
        state, addresses = zeros(3, dtype=torch.int64), zeros(5, dtype=torch.int64)
        places = zeros(3 * place_words)
        ports = StagePorts(
            is_first, is_last, True, 3, _MAX_ROWS, model.hidden_size, state, zeros(FLAG_WORDS), places, addresses,
            place_words,
        )  # fmt: skip
        begin_step(ports, 1, 0)
        put_rows(ports, take_rows(ports, sizes.max_seqs))
        send_tokens(ports, zeros(num_slots), zeros(num_slots))


def _without_kernels() -> Any:
    def do_nothing(*arguments: Any) -> None:
        pass

    return SimpleNamespace(plan_queries=do_nothing, run_queries=do_nothing)
