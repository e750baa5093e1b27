"""All device memory that steps need is taken before ready: torch asks the driver for nothing afterwards."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from toka_engine.model.cuda.memory_fit import make_largest_steps
from toka_engine.model.sample_plan import Sampled, SamplePlan
from toka_engine.model.slot_state import HostSlots
from toka_engine.model.worker import Worker

from tests.gpu.test_parity import make
from tests.model.driving import Driver, load

MAX_SEQS = 200


class Frugal(Driver):
    """Keeps no logits, which would take memory that no engine takes."""

    def _record(self, logits: torch.Tensor, rows: torch.Tensor | None, plan: SamplePlan, state: HostSlots) -> Sampled:
        return self._sample(logits, rows, plan, state)


def count_segments() -> int:
    """The number of times that torch has asked the driver for memory."""
    return int(torch.cuda.memory_stats()["segment.all.allocated"])


def step_at_random(worker: Worker) -> None:
    """Prompts of any number and lengths, whose rows ask for anything, and steps of some of these rows."""
    random, driver = np.random.default_rng(3), Frugal(worker)
    for _ in range(12):
        count = int(random.integers(1, MAX_SEQS))
        slots = random.permutation(MAX_SEQS)[:count].tolist()
        num_tokens = min(2048, 400 * count) - count
        lengths = random.multinomial(num_tokens, np.ones(count) / count) + 1
        prompts = {slot: random.integers(3, 200, length).tolist() for slot, length in zip(slots, lengths, strict=True)}
        for slot in slots:
            driver.pages[slot] = []
        asked = {"temperature": 1.0, "top_p": random.choice([1.0, 0.9]), "num_logprobs": random.integers(-1, 20)}
        driver.prefill(prompts, **driver.add_slots(slots, **asked))
        for _ in range(3):
            driver.decode(random.choice(slots, int(random.integers(1, count + 1)), replace=False).tolist())


@pytest.mark.parametrize("kv_cache_num_tokens", [400_000, None], ids=["the user's cache", "a fitted cache"])
@pytest.mark.parametrize("cudagraph_max_size", [40, MAX_SEQS])
def test_no_step_takes_memory_after_ready(
    tmp_path: Path, kv_cache_num_tokens: int | None, cudagraph_max_size: int
) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    make("Llama", tmp_path)
    settings = {"max_seqs_per_forward": MAX_SEQS, "max_tokens_per_forward": 2048}
    sizes = {"kv_cache_num_tokens": kv_cache_num_tokens, "cudagraph_max_size": cudagraph_max_size}
    worker = load(tmp_path, device="cuda", dtype="bfloat16", **settings, **sizes)
    worker.warm_up()
    before = count_segments()
    for step in make_largest_steps(worker.ready):
        worker.runner.finish(worker.runner.launch(step))
    step_at_random(worker)
    torch.cuda.synchronize()
    assert count_segments() == before


def read_free_bytes() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])


def test_graphs_take_what_was_estimated(tmp_path: Path) -> None:
    """The layers are wide: what each size kept for itself would be most of it."""
    read_free_bytes()  # an earlier test's engine is gone
    sizes = {"hidden_size": 8192, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = transformers.LlamaConfig(**sizes, head_dim=64, num_hidden_layers=2, vocab_size=2000)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    settings = {"max_seqs_per_forward": 4096, "max_tokens_per_forward": 4096, "kv_cache_num_tokens": 80_000}
    worker = load(tmp_path, device="cuda", dtype="bfloat16", **settings)
    worker.warm_up()
    worker.runner.decode_graphs = None
    free = read_free_bytes()
    estimate = worker.runner.measure_graphs()
    assert read_free_bytes() >= free - (8 << 20)
    free = read_free_bytes()
    worker.runner.capture_graphs()
    taken = free - read_free_bytes()
    print(f"estimated {estimate >> 20} MiB, taken {taken >> 20} MiB")
    assert abs(estimate - taken) <= 200 << 20
