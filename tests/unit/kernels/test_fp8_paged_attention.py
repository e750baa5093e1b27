"""The GPU backend over a cache of 8-bit floats gives what one of the model's dtype gives for the same numbers.

flashinfer's kernels are replaced by their definition, as in `test_paged_attention`.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toka_engine.model.attention_backend import AttentionShape

from tests.marks import rest_is_slow
from tests.unit.kernels.test_paged_attention import (
    LAYOUTS,
    PAGE_SIZE,
    DefinedKernels,
    allocate,
    int32,
    layout_of,
    plan_padded,
    shared_table,
)

E4M3 = torch.float8_e4m3fn


def make_backend(cache_dtype: torch.dtype | None, columns: int):
    from toka_engine.model.cuda.attention import CudaAttention
    from toka_engine.model.cuda.flashinfer_prefill import HND

    shape = AttentionShape(2, 6, 2, 32, 32**-0.5, torch.float32, torch.device("cpu"), cache_dtype)
    backend = CudaAttention(shape, HND, DefinedKernels(shape, True))
    allocate(backend, 8 * columns, 8, columns)
    return backend


@pytest.mark.parametrize("name", rest_is_slow(["both", "nested"], list(LAYOUTS)))
def test_each_mix_of_rows_gives_what_a_cache_of_the_models_dtype_gives_for_the_same_numbers(name: str) -> None:
    layout, columns = LAYOUTS[name], 6
    stored, wide = make_backend(E4M3, columns), make_backend(None, columns)
    assert stored.shape.kv_bytes_per_token * 4 == wide.shape.kv_bytes_per_token
    table = shared_table(layout, columns, np.random.default_rng(3))
    slots, positions = np.repeat(int32(*range(8)), columns), np.tile(int32(*range(columns)), 8)
    seeds = torch.Generator().manual_seed(5)
    past = torch.randn(wide.cache.shape, generator=seeds).to(E4M3)
    angles = torch.cat((torch.ones(columns * PAGE_SIZE, 16), torch.zeros(columns * PAGE_SIZE, 16)), dim=1)  # of no turn
    rows = layout.decode_slots.size + int(layout.prefill_lengths.sum())
    q = torch.randn(rows, 6, 32, generator=seeds)
    k, v = torch.randn(2, rows, 2, 32, generator=seeds).to(E4M3).float()
    results = []
    for backend in (stored, wide):
        backend.cache.copy_(past)
        backend.append_pages(slots, positions, table.reshape(-1))
        backend.plan(layout)
        results.append([backend.forward(layer, q, k, v, angles) for layer in range(2)])
        if not layout.prefill_slots.size:
            plan_padded(backend, layout, 8)
            padded = [torch.cat((each, torch.ones(8 - rows, *each.shape[1:]))) for each in (q, k, v)]
            results[-1].append(backend.forward(1, *padded, angles)[:rows])
    torch.testing.assert_close(*results, atol=2e-5, rtol=1e-4)
    used = torch.from_numpy(table).long().unique()
    assert torch.equal(stored.cache.float()[:, :, used], wide.cache[:, :, used])


def test_chunks_that_read_more_pages_than_are_widened_at_once_are_attended_in_several_runs() -> None:
    columns, seeds = 6, torch.Generator().manual_seed(5)
    layout = layout_of({0: 13}, [(1, 3, 6), (2, 0, 24), (3, 17, 5), (4, 0, 1)], [])
    q, angles = torch.randn(37, 6, 32, generator=seeds), torch.randn(columns * PAGE_SIZE, 32, generator=seeds)
    k, v = torch.randn(2, 37, 2, 32, generator=seeds)
    results = []
    for num_wide in (1 << 15, columns):
        backend = make_backend(E4M3, columns)
        backend._chunks._wide = backend._chunks._wide[:, :num_wide].contiguous()
        table = np.random.default_rng(3).permutation(8 * columns).astype(np.int32)
        slots, positions = np.repeat(int32(*range(8)), columns), np.tile(int32(*range(columns)), 8)
        backend.append_pages(slots, positions, table)
        backend.plan(layout)
        results.append((len(backend._step.prefill), backend.forward(1, q, k, v, angles)))
    assert [runs for runs, _ in results] == [1, 4]
    assert torch.equal(results[0][1], results[1][1])


def test_chunks_are_cut_into_the_fewest_runs_in_their_order() -> None:
    from toka_engine.model.cuda.attention_plan import cut_chunks

    layout = layout_of({}, [(0, 0, 8), (1, 4, 1), (2, 0, 4), (3, 12, 4)], [])  # 2, 2, 1 and 4 pages
    found = {most: [(run.start, run.stop) for run in cut_chunks(layout, PAGE_SIZE, most)] for most in (4, 5, 9, None)}
    assert found == {4: [(0, 2), (2, 3), (3, 4)], 5: [(0, 3), (3, 4)], 9: [(0, 4)], None: [(0, 4)]}
    assert cut_chunks(layout_of({0: 1}, [], []), PAGE_SIZE, 4) == []
    assert cut_chunks(layout_of({0: 1}, [], []), PAGE_SIZE, None) == []
