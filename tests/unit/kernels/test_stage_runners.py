"""The runners of pipeline stages on GPUs, in turn on one device, say what one runner says, bit for bit.

Everything of them runs but CUDA graphs and attention, whose kernels are replaced by their definition: flashinfer needs
a GPU, and ours takes minutes in the interpreter.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from toka_engine.config import EngineConfig
from toka_engine.messages import Step, Tokens
from toka_engine.model.architectures.registry import build_model
from toka_engine.model.attention_backend import AttentionShape
from toka_engine.model.backend import Launched
from toka_engine.model.config_fields import ConfigFields
from toka_engine.model.loader import Weights
from toka_engine.model.model_config import ModelConfig, parse_model_config
from toka_engine.model.ranks import SingleRank
from toka_engine.model.sharding import Shard
from toka_engine.model.stages import Stage
from toka_engine.model.torch_norms import add_rms_norm, rms_norm

from tests.marks import rest_is_slow
from tests.model.driving import Driver
from tests.unit.kernels.conftest import ON_GPU
from tests.unit.kernels.simulated_graphs import simulated_graphs
from tests.unit.kernels.test_paged_attention import PAGE_SIZE, DefinedKernels
from tests.unit.kernels.test_stage_exchange import NUM_SLOTS, make_stages

pytestmark = pytest.mark.skipif(ON_GPU, reason="tests/gpu/test_pipeline_parallel.py runs them on GPUs")

CPU = torch.device("cpu")
MAX_SEQS, NUM_PAGES, NUM_PLACES = NUM_SLOTS - 1, 200, 3
MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "head_dim": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


class NamedWeights(Weights):
    """Random tensors, which depend on their names alone."""

    def __init__(self) -> None:
        super().__init__(Path(), CPU, torch.bfloat16, 0)

    def take(self, name: str, shape: tuple[int, ...], shard: Shard | None = None) -> torch.Tensor:
        random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return (torch.randn(shape, generator=random) * (1.0 if len(shape) == 1 else 0.2)).to(torch.bfloat16)


def make_runner(model: ModelConfig, stage: Stage, stages: Any = None) -> Any:
    """Make the runner of a stage of `model`; `stages` is its exchange, None if it is the only one."""
    from toka_engine.model.cuda.attention import CudaAttention
    from toka_engine.model.cuda.backend import make_ops
    from toka_engine.model.cuda.runner import CudaRunner
    from toka_engine.model.cuda.stage_runner import LastStageRunner, StageRunner

    class OnHost:
        """The parts of a runner that need a CUDA device."""

        def _reserve_outputs(self, device: torch.device, max_seqs: int) -> None:
            self._stream = None

        def _fetch(self, step: Step, plan: Any, sampled: Any, scores: Any, *times: float) -> Launched:
            return Launched(step.number, plan, sampled, 0.0, 0.0, scores=scores)

        def finish(self, launched: Launched) -> Tokens:
            sampled = launched.sampled
            if sampled is None:
                return Tokens(launched.number, np.empty(0, np.int32))
            logprobs = np.empty(0, np.float32) if sampled.logprobs is None else sampled.logprobs.numpy().copy()
            return Tokens(launched.number, sampled.ids.numpy().copy(), logprobs)

    def make_head(weight: torch.Tensor) -> Any:
        return lambda x: x.float() @ weight.float().t()

    # Triton's interpreter rounds to bfloat16 towards zero, torch's add in the place of a hand-over does not.
    ops = replace(make_ops(80), make_head=make_head, gemv=None, rms_norm=rms_norm, add_rms_norm=add_rms_norm)
    shape = AttentionShape.of(model, torch.bfloat16, CPU, num_layers=len(stage.layers))
    attention = CudaAttention(shape, kernels=DefinedKernels(shape, True))
    attention.allocate(NUM_PAGES, PAGE_SIZE, MAX_SEQS, 16)
    config = EngineConfig(seed=0, use_cudagraphs=False)
    built = build_model(model, NamedWeights(), ops, SingleRank(), stage)
    if stages is None:
        return type("Whole", (OnHost, CudaRunner), {})(built, attention, MAX_SEQS, config)
    if stages.ports.is_last:
        return type("Last", (OnHost, LastStageRunner), {})(built, attention, MAX_SEQS, config, stages)
    return type("Earlier", (StageRunner,), {"_reserve_outputs": OnHost._reserve_outputs})(
        built, attention, MAX_SEQS, config, stages
    )


def attend_decode(q, k, v, cos_sin, slots, positions, table, keys, values, out, work, scale, part=None) -> None:
    """kernels.decode_attention.attend_decode by its definition."""
    from toka_engine.model.kernels.rope_append import rope_append

    rotated = torch.empty(q.shape, dtype=q.dtype)
    rope_append(q, k, v, cos_sin, slots, positions, table, keys, values, rotated)
    group = q.shape[1] // k.shape[1]
    for row, (slot, position) in enumerate(zip(slots.tolist()[: len(q)], positions.tolist(), strict=False)):
        pages = table[slot, : position // PAGE_SIZE + 1].long()
        seen, weighed = (
            each[pages].flatten(0, 1)[: position + 1].repeat_interleave(group, dim=1) for each in (keys, values)
        )
        scores = torch.einsum("hd,nhd->hn", rotated[row], seen) * scale
        out[row] = torch.einsum("hn,nhd->hd", scores.softmax(-1), weighed)


def make_driver(runner: Any) -> Driver:
    return Driver(SimpleNamespace(runner=runner, ready=SimpleNamespace(page_size=PAGE_SIZE)))  # type: ignore[arg-type]


class AtOnce:
    """A torch.cuda.Event where everything has happened already."""

    def record(self, stream: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.mark.parametrize("has_graphs", rest_is_slow([False], [False, True]), ids=["kernel by kernel", "layer graphs"])
def test_stages_in_turn_say_what_one_runner_says(monkeypatch: pytest.MonkeyPatch, has_graphs: bool) -> None:
    with simulated_graphs(monkeypatch):
        compare_stages(monkeypatch, max_layer_rows=16 if has_graphs else 0)


def compare_stages(monkeypatch: pytest.MonkeyPatch, max_layer_rows: int) -> None:
    """Run steps of all kinds in three stages and in one; up to so many rows the stages replay graphs."""
    from toka_engine.model.cuda.gpu_stages import GpuStages

    monkeypatch.setattr(torch.cuda, "Event", AtOnce)
    monkeypatch.setattr("toka_engine.model.cuda.attention.attend_decode", attend_decode)
    model, split = parse_model_config(ConfigFields(MODEL, Path())), (1, 1, 1)
    whole = make_driver(make_runner(model, Stage.whole(model.num_layers)))
    shared = make_stages(CPU, len(split), NUM_PLACES, width=model.hidden_size, max_rows=64)
    parts = []
    for index, (count, ports) in enumerate(zip(split, shared.ports, strict=True)):
        begin = sum(split[:index])
        stage = Stage(index, len(split), begin, begin + count)
        parts.append(make_driver(make_runner(model, stage, GpuStages(None, ports, shared.tokens))))  # type: ignore[arg-type]
    last, runners = parts[-1], [part.worker.runner for part in parts]
    for runner in runners:
        runner._max_layer_rows = max_layer_rows
        runner._capture_layers(max_tokens=64)

    def check(act: Any) -> None:
        """Do the same with every stage, and with the whole."""
        *others, found = [act(part) for part in parts]
        expected = act(whole)
        assert all(other.ids.size == 0 for other in others)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.logprobs, expected.logprobs)
        assert torch.equal(last.logits, whole.logits)
        assert whole.logits.std() > 0.1

    prompts = {0: [5, 6, 7, 8, 9], 1: [11], 2: [3, 3, 1, 4, 1, 5, 9, 2], 3: [6, 5]}
    asked = {"temperature": [0, 1.0, 0.8, 1.0], "seed": [-1, 5, -1, -1], "presence_penalty": [0.5, 0, 0, 0]}
    asked |= {"top_k": [0, 0, 0, 7], "num_logprobs": [0, -1, -1, -1]}
    check(lambda driver: driver.prefill(prompts, **driver.add_slots(list(prompts), **asked)))
    check(lambda driver: driver.decode([0, 1, 2, 3]))
    check(lambda driver: driver.decode([2]))
    more = {4: [8, 8, 8], 5: [1, 2]}

    def mix(driver: Driver) -> Tokens:
        """Decode rows beside prompts, one of which is sampled for twice."""
        new = driver.add_slots([4, 5, 6], temperature=[0, 1.0, 1.0], seed=3)
        driver.lengths.update({0: driver.lengths[0] + 1, 3: driver.lengths[3] + 1})
        pages = driver.grow({0: driver.lengths[0], 3: driver.lengths[3], 4: 3, 5: 2})
        ints = [np.array(each, np.int32) for each in ([0, 3], [4, 5], [0, 0], [3, 2], [8, 8, 8, 1, 2], [4, 6], [0, 1])]
        names = ("decode_slots", "prefill_slots", "prefill_starts", "prefill_lengths", "prefill_tokens")
        fields = dict(zip((*names, "fanout_slots", "fanout_chunks"), ints, strict=True))
        return driver.run(**new, **pages, **fields)

    check(mix)
    driver_lengths = {slot: len(ids) for slot, ids in more.items()}
    for driver in (*parts, whole):
        driver.lengths.update(driver_lengths)
    check(lambda driver: driver.decode([0, 4]))
    steps = whole.number
    assert [ports.state.tolist() for ports in shared.ports] == [[1, steps, steps]] * len(split)
    if max_layer_rows:
        replays = [runner.layer_graphs._pieces[max_layer_rows].first.num_replays for runner in runners]
        assert replays == [steps] * len(split)


def test_rows_that_pad_what_is_sampled_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", AtOnce)
    monkeypatch.setattr("toka_engine.model.cuda.attention.attend_decode", attend_decode)
    model = parse_model_config(ConfigFields(MODEL, Path()))
    plain, padded = (make_driver(make_runner(model, Stage.whole(model.num_layers))) for _ in range(2))
    graphs = padded.worker.runner.make_decode_graphs(20)
    assert [graphs.pad_sampled(count) for count in (1, 2, 5, 9, 12, 20, 21)] == [1, 2, 6, 12, 12, 20, 21]
    seen: list[int] = []
    find_logits = padded.worker.runner.model.logits

    def note_rows(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden.shape[0])
        return find_logits(hidden)

    monkeypatch.setattr(padded.worker.runner.model, "logits", note_rows)
    prompts = {slot: [slot + 3] * (slot + 2) for slot in range(5)}
    for count, expected in ((5, 6), (1, 1), (2, 2)):
        chosen = dict(list(prompts.items())[:count])
        asked = {"temperature": 1.0, "seed": 4, "num_logprobs": 2}
        padded.worker.runner.decode_graphs = graphs
        found, sought = (
            driver.prefill(chosen, **driver.add_slots(list(chosen), **asked)) for driver in (padded, plain)
        )
        np.testing.assert_array_equal(found.ids, sought.ids)
        np.testing.assert_array_equal(found.logprobs, sought.logprobs)
        assert torch.equal(padded.logits, plain.logits)
        assert padded.logits.shape == (count, model.vocab_size)
        assert seen.pop() == expected
        for driver in (padded, plain):
            driver.reset()
