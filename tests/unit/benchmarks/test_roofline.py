"""The roofline's counts against figures made by hand, and against a schedule that is walked step by step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toka_engine.benchmarks.roofline import (
    Limits,
    ModelCosts,
    Sizes,
    Work,
    best_seconds,
    count_costs,
    count_work,
    decode_attention_seconds,
)
from toka_engine.benchmarks.workloads import make_workload
from toka_engine.model.model_config import read_model_config

COSTS = ModelCosts(layer_weights=1000, head_weights=200, bytes_per_number=2, kv_bytes_per_token=32, flops_per_pair=64)


def test_a_models_matrices_and_keys_are_counted(tmp_path: Path) -> None:
    fields = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 32,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    # q and out 8 x 8, k and v 8 x 4, three of 8 x 16: 576 numbers a layer. Keys and values: 2 layers x 2 x 4 numbers.
    assert count_costs(read_model_config(tmp_path), 2) == ModelCosts(
        layer_weights=1152, head_weights=256, bytes_per_number=2, kv_bytes_per_token=32, flops_per_pair=64
    )


def test_the_work_of_two_requests_with_a_shared_prefix_is_that_counted_by_hand() -> None:
    work = count_work([Sizes(5, 3), Sizes(4, 2)], shared=2, concurrency=2, max_rows=4)
    assert work == Work(
        num_steps=3,
        num_rows=10,  # prompts 2 + 3 + 2, then 2 + 1 decode rows
        num_head_rows=5,  # one for each prompt, one for each decode row
        own_keys=4 + 5 + 3,
        shared_keys=2 * 2,
        shared_pairs=2 * 3,
        prompt_keys=2 + 5 + 4,
        prompt_pairs=(1 + 2) + (3 + 4 + 5) + (3 + 4),
    )


def test_many_samples_read_their_prompt_once_a_step_and_compute_it_once() -> None:
    work = count_work([Sizes(10, 3, choices=4)], shared=0, concurrency=1, max_rows=4)
    assert (work.num_steps, work.num_rows, work.num_head_rows) == (3, 10 + 8, 1 + 8)
    assert (work.shared_keys, work.shared_pairs, work.own_keys) == (20, 80, 4 * (1 + 2))
    halved = count_work([Sizes(10, 3, choices=4)], shared=0, concurrency=1, max_rows=2)
    assert (halved.num_steps, halved.shared_keys, halved.shared_pairs) == (4, 40, 80), "two rows at a time"


def test_requests_one_at_a_time_take_the_sum_of_their_steps() -> None:
    assert count_work([Sizes(4, 8)] * 3, shared=0, concurrency=1, max_rows=100).num_steps == 24
    assert count_work([Sizes(4, 8)] * 3, shared=0, concurrency=3, max_rows=100).num_steps == 8
    assert count_work([Sizes(4, 1)] * 3, shared=0, concurrency=3, max_rows=100).own_keys == 0


def test_each_part_takes_the_longer_of_its_bytes_and_flops() -> None:
    work = Work(
        num_steps=3, num_rows=30, num_head_rows=2, own_keys=50, shared_keys=5, shared_pairs=100, prompt_keys=1,
        prompt_pairs=10,
    )  # fmt: skip
    parts = best_seconds(COSTS, work, Limits(bytes_per_s=100.0, flops_per_s=200.0))
    assert parts == {
        "layers": 2 * 1000 * 30 / 200,  # more than 3 x 2,000 bytes
        "head": 3 * 400 / 100,  # more than 2 x 200 x 2 FLOP
        "own_attention": 50 * 32 / 100,  # 16 s; as many pairs: 16 s too
        "shared_attention": 100 * 64 / 200,  # more than 5 x 32 bytes
        "prompt_attention": 10 * 64 / 200,
    }


def test_a_group_reads_its_shared_keys_once_in_a_decode_step() -> None:
    limits = Limits(bytes_per_s=1.0, flops_per_s=1e9)
    assert decode_attention_seconds(COSTS, 8, 100, 3, False, limits) == 8 * 103 * 32
    assert decode_attention_seconds(COSTS, 8, 100, 3, True, limits) == (100 + 8 * 3) * 32


@pytest.mark.parametrize(
    ("name", "documented"), [("single", 1198), ("chat", 60e3), ("monkeys", 240e3), ("sharegpt", 100e3)]
)
def test_on_an_h100_the_limits_are_about_those_that_the_bars_were_set_by(name: str, documented: float) -> None:
    """docs/performance.md's column, made by hand, rounded and with fewer of attention's FLOPs: within a tenth."""
    llama_1b = ModelCosts(
        layer_weights=16 * 2048 * (2 * 2048 + 2 * 512 + 3 * 8192),
        head_weights=128_256 * 2048,
        bytes_per_number=2,
        kv_bytes_per_token=2 * 16 * 512 * 2,
        flops_per_pair=4 * 16 * 2048,
    )
    scale = 1.0 if name == "single" else 0.25  # the ratios stay, the test is short
    workload = make_workload(name, scale, 1, 128_000)
    concurrency = max(1, int(workload.concurrency * scale)) if name == "sharegpt" else workload.concurrency
    work = count_work(workload.sizes(), workload.num_shared, concurrency, 4096)
    seconds = sum(best_seconds(llama_1b, work, Limits(3.0e12, 775e12)).values())
    num_tokens = sum(request.num_output_tokens for request in workload.requests)
    assert num_tokens / seconds == pytest.approx(documented, rel=0.1)


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=5),
    st.integers(0, 7),
)
def test_counts_are_those_of_all_requests_walked_step_by_step(own: list[tuple[int, int, int]], shared: int) -> None:
    requests = [Sizes(shared + prompt, output, choices) for prompt, output, choices in own]
    work = count_work(requests, shared, concurrency=len(requests), max_rows=1000)
    own_keys = shared_keys = shared_pairs = num_rows = 0
    for step in range(1, work.num_steps):  # step 0 is the prompts'
        running = [request for request in requests if step < request.output]
        shared_keys += shared if running else 0
        for request in running:
            num_rows += request.choices
            shared_pairs += shared * request.choices
            for _ in range(request.choices):
                own_keys += step + (request.prompt - shared if request.choices == 1 else 0)
            if request.choices > 1:
                shared_keys += request.prompt - shared
                shared_pairs += (request.prompt - shared) * request.choices
    assert (work.own_keys, work.shared_keys, work.shared_pairs) == (own_keys, shared_keys, shared_pairs)
    assert work.num_head_rows == num_rows + len(requests)
    prompt_pairs = sum(range(1, shared + 1))
    for request in requests:
        prompt_pairs += sum(range(shared + 1, request.prompt + 1))
    assert work.prompt_pairs == prompt_pairs
