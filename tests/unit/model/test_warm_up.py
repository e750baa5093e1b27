"""A start on a GPU launches whatever would be loaded later, and measures steps of a few sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from toka_engine.messages import Step, Tokens, WorkerReady
from toka_engine.model.cpu.backend import make_ops
from toka_engine.model.cuda.products import Products, list_row_counts
from toka_engine.model.cuda.warm_up import measure_steps
from toka_engine.model.ops import Gemm


def test_a_product_of_each_shape_is_launched_once_with_every_number_of_rows() -> None:
    launched: list[tuple[str, int]] = []

    def make_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Gemm:
        name = f"{'x'.join(map(str, weight.shape))} {'plain' if bias is None else 'with a bias'}"

        def gemm(x: torch.Tensor) -> torch.Tensor:
            assert x.dtype == weight.dtype
            launched.append((name, x.shape[0]))
            return torch.nn.functional.linear(x, weight, bias)

        return gemm

    products = Products()
    ops = products.watch(replace(make_ops(), make_linear=make_linear))
    for _ in range(3):
        for shape in ((12, 8), (8, 12)):
            x = torch.ones(2, shape[1])
            assert torch.equal(ops.make_linear(torch.ones(shape), None)(x), torch.full((2, shape[0]), float(shape[1])))
    ops.make_linear(torch.ones(12, 8), torch.ones(12))
    launched.clear()
    products.load(40)
    rows = [9, 17, 25, 33, 40]
    names = ("12x8 plain", "8x12 plain", "12x8 with a bias")
    assert launched == [(name, count) for name in names for count in rows]
    products.load(40)
    assert len(launched) == 15, "the model's weights are no longer held"


def test_row_counts_end_with_the_largest_step() -> None:
    for most in (1, 2, 9, 100, 8192):
        counts = list(list_row_counts(most))
        assert counts == sorted(set(counts))
        assert counts[-1:] == ([most] if most > 1 else [])
    assert 100 < len(list(list_row_counts(8192))) < 200


@pytest.mark.parametrize(
    ("num_pages", "page_size", "max_seqs", "max_tokens", "columns"),
    [(60_000, 16, 4096, 8192, 8192), (3, 2, 1, 2, 3), (1, 1, 1, 1, 1), (64, 16, 300, 96, 4), (100, 7, 5, 40, 100)],
)
def test_measured_steps_fit_whatever_the_sizes_are(
    num_pages: int, page_size: int, max_seqs: int, max_tokens: int, columns: int
) -> None:
    ready = WorkerReady(
        vocab_size=9, max_positions=columns * page_size, num_pages=num_pages, page_size=page_size, max_seqs=max_seqs,
        max_tokens_per_forward=max_tokens, max_pages_per_seq=columns, device="cuda", dtype="bfloat16", num_layers=1,
        num_heads=1, num_kv_heads=1, head_dim=8,
    )  # fmt: skip
    steps: list[Step] = []
    seconds = iter(np.arange(8, 0, -1).tolist())

    def run(step: Step) -> Tokens:
        steps.append(step)
        return Tokens(0, step.decode_slots, step_wall_s=next(seconds))

    times = measure_steps(ready, run)
    assert [each.seconds for each in times] == [7, 5, 3, 1], "the least of two turns"
    assert [each.num_rows for each in times] == [1, min(256, max_seqs, max_tokens), min(256, max_seqs, max_tokens), 0]
    for step, time in zip(steps[::2], times, strict=True):
        num_rows, num_prefill = step.decode_slots.size, int(step.prefill_lengths.sum())
        assert (time.num_rows, time.num_prefill) == (num_rows, num_prefill)
        assert 0 < num_rows + num_prefill <= max_tokens
        assert time.num_context == (step.new["length"][: step.decode_slots.size]).sum()
        assert step.append_slots.size == 0 or step.append_slots.max() < max_seqs
        assert step.append_pages.size == 0 or step.append_pages.max() < num_pages
        num_columns = np.bincount(step.append_slots, minlength=max_seqs)
        assert num_columns.max() <= columns
        needed = np.append(step.new["length"] + 1, num_prefill) if time.num_context else [num_prefill]
        assert max(needed) <= max(1, num_columns.max()) * page_size
