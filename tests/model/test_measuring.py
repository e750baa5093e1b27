"""The steps by which a GPU's KV cache is sized are as large as any step may be, and run on the provisional cache.

What they measure is measured on a GPU only; that the steps themselves are sound is shown here on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from toka_engine.model.cuda.memory_fit import make_largest_steps, provisional_sizes
from toka_engine.model.sizing import Sizes

from tests.model.driving import load


@pytest.mark.parametrize(
    ("num_positions", "max_tokens", "max_seqs"),
    [(128, 128, 16), (128, 500, 40), (100, 64, 100), (16, 40, 50), (20, 33, 7)],
)
def test_the_largest_steps_fill_a_forward_and_run_on_the_provisional_cache(
    make_tiny: Callable[..., tuple[Any, Path]], num_positions: int, max_tokens: int, max_seqs: int
) -> None:
    _, folder = make_tiny(max_position_embeddings=num_positions)
    settings = {"max_tokens_per_forward": max_tokens, "max_seqs_per_forward": max_seqs}
    columns = -(-num_positions // 16)
    num_pages = provisional_sizes(Sizes(10**6, 16, max_seqs, max_tokens, columns)).num_pages
    worker = load(folder, kv_cache_num_tokens=num_pages * 16, **settings)
    ready = msgspec.structs.replace(worker.ready, max_pages_per_seq=columns)
    worker.runner.attention.allocate(num_pages, 16, max_seqs, columns)
    prefill, decode = make_largest_steps(ready)
    assert num_pages * 16 <= max_tokens + max_seqs * 16
    assert prefill.append_pages.size == len(set(prefill.append_pages.tolist())) == num_pages
    longest = (columns - 1) * 16 if columns > 1 else 1
    assert prefill.prefill_lengths.sum() == min(max_tokens, max_seqs * longest)
    assert prefill.prefill_lengths.max() <= num_positions
    assert decode.decode_slots.size == min(max_tokens, max_seqs)
    for step in (prefill, decode):
        ids = worker.runner.finish(worker.runner.launch(step)).ids
        assert ids.size == step.decode_slots.size + step.fanout_slots.size
        assert bool(np.isin(ids, np.arange(256)).all())


def test_the_largest_steps_ask_for_all_that_takes_memory_and_run_on_any_cache(
    make_tiny: Callable[..., tuple[Any, Path]],
) -> None:
    _, folder = make_tiny()
    worker = load(folder, kv_cache_num_tokens=48, max_tokens_per_forward=200, max_seqs_per_forward=20)
    prefill, decode = make_largest_steps(worker.ready)
    assert set(prefill.append_pages.tolist()) == {0, 1, 2}
    for step in (prefill, decode):
        assert bool((step.new["top_p"] < 1).all())
        assert bool((step.new["num_logprobs"] == 20).all())
        tokens = worker.runner.finish(worker.runner.launch(step))
        assert tokens.ids.size == step.decode_slots.size + step.fanout_slots.size
        assert (tokens.top_width, tokens.top_rows.size) == (20, tokens.ids.size)
