"""Pipeline stages are kept busy: two of them make far more tokens than one GPU, and streams wait no longer."""

from __future__ import annotations

from dataclasses import replace

import pytest
from toka_engine.config import EngineConfig
from toka_engine.manager.sizes import choose_sizes
from toka_engine.messages import WorkerReady

from tests.unit.manager.timed import Machine, Shape, TimedEngine, Times

LLAMA_8B = Machine(step_ms=5.0, row_ms=0.02, context_ms=40e-6, prefill_ms=0.022, chunk_context_ms=1e-6, noise=0.03)
"""One H200."""
READY = WorkerReady(
    vocab_size=128_256, max_positions=8192, num_pages=60_000, page_size=16, max_seqs=4096, max_tokens_per_forward=8192,
    max_pages_per_seq=512, device="cuda", dtype="bfloat16", num_layers=16, num_heads=32, num_kv_heads=8, head_dim=128,
)  # fmt: skip
CHAT = Shape((512, 512), (256, 256), is_streamed=True)
MIXED = Shape((8, 440), (8, 400))


def serve(num_stages: int, num_clients: int, shape: Shape, seconds: float, settle_s: float, **settings: float) -> Times:
    """Run clients that each have one request at a time."""
    config = EngineConfig(pp_size=num_stages, **settings)  # type: ignore[arg-type]
    engine = TimedEngine(
        replace(LLAMA_8B, num_stages=num_stages),
        rate=0,
        num_lines=num_clients,
        line_priority=0,
        shape=shape,
        sizes=choose_sizes(config, READY),
        config=config,
    )
    engine.run(seconds, settle_s)
    return engine.times[True]


@pytest.mark.parametrize(
    ("num_clients", "shape", "settle_s", "least"),
    [(64, CHAT, 4.0, 1.2), (256, CHAT, 8.0, 1.5), (1024, MIXED, 20.0, 1.55)],
)
def test_two_stages_make_more_tokens_than_one_gpu_with_shorter_gaps(
    num_clients: int, shape: Shape, settle_s: float, least: float
) -> None:
    one, two = (serve(num_stages, num_clients, shape, 8.0, settle_s) for num_stages in (1, 2))
    print(f"{two.num_tokens / one.num_tokens:.2f} x, gaps {one.gap_ms(50):.1f} and {two.gap_ms(50):.1f} ms")
    assert two.num_tokens > least * one.num_tokens
    assert two.gap_ms(50) < 1.1 * one.gap_ms(50)


def test_two_stages_keep_to_the_target_for_gaps() -> None:
    two = serve(2, 256, CHAT, 5.0, 3.0, target_gap_ms=40.0)
    assert two.gap_ms(99) < 1.25 * 40.0


def test_a_long_prompt_is_in_both_stages_at_once() -> None:
    one, two = (serve(num_stages, 1, Shape((8000, 8000), (2, 2)), 5.0, 1.0) for num_stages in (1, 2))
    assert two.first_ms(50) < 0.75 * one.first_ms(50)
