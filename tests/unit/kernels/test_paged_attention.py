"""The GPU backend's planning, page handling and merging give what the CPU backend gives, for any mix of a step.

Everything of the backend runs but flashinfer itself, which needs a GPU: its kernels for prefill are replaced by their
definition, computed from the same index arrays. tests/gpu runs the same comparison on the real kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from toka_engine.model.attention_backend import AttentionShape, StepLayout
from toka_engine.model.cpu.attention import CpuAttention

from tests.marks import rest_is_slow

PAGE_SIZE = 4


class DefinedKernels:
    """FlashInferPrefill by their definition, from the device's index arrays."""

    def __init__(self, shape: AttentionShape, is_heads_first: bool) -> None:
        self._shape, self._is_heads_first = shape, is_heads_first

    def plan_queries(self, batch: Any) -> None:
        pass

    def run_queries(self, planned, q, cache, q_indptr, pages, out) -> None:
        keys, values = cache.transpose(2, 3) if self._is_heads_first else cache
        for i, (begin, end) in enumerate(zip(q_indptr[:-1].tolist(), q_indptr[1:].tolist(), strict=True)):
            first, last = pages.kv_indptr[i].item(), pages.kv_indptr[i + 1].item()
            chosen = pages.kv_indices[first:last].long()
            length = (last - first - 1) * PAGE_SIZE + pages.last_page_lens[i].item()
            group = self._shape.num_heads // self._shape.num_kv_heads
            k = keys[chosen].flatten(0, 1)[:length].repeat_interleave(group, dim=1)
            v = values[chosen].flatten(0, 1)[:length].repeat_interleave(group, dim=1)
            scores = torch.einsum("qhd,nhd->qhn", q[begin:end], k) * self._shape.scale
            seen = torch.arange(length)[None] <= torch.arange(length - (end - begin), length)[:, None]
            scores = scores.masked_fill(~seen[:, None], -torch.inf)
            out[begin:end] = torch.einsum("qhn,nhd->qhd", scores.softmax(-1), v)


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def layout_of(decode: dict[int, int], prefill: list[tuple[int, int, int]], groups: list[tuple[int, ...]]) -> StepLayout:
    """decode: slot -> position; prefill: (slot, start, length); groups: (row, rows, column, columns)."""
    table = np.array(groups, np.int32).reshape(-1, 4)
    chunks = np.array(prefill, np.int32).reshape(-1, 3)
    return StepLayout(
        int32(*decode), int32(*decode.values()), *chunks.T.copy(), *table.T.copy()
    )  # fmt: skip


LAYOUTS = {
    "decode": layout_of({3: 0, 1: 4, 0: 22}, [], []),
    "prefill": layout_of({}, [(2, 0, 9), (4, 5, 3)], []),
    "both": layout_of({0: 13, 3: 8}, [(1, 3, 6)], []),
    "one group": layout_of({0: 13, 1: 12, 2: 15}, [], [(0, 3, 0, 2)]),
    "group and others": layout_of({5: 2, 0: 13, 1: 12, 4: 7}, [(3, 0, 5)], [(1, 2, 0, 3)]),
    "two groups with a gap": layout_of({0: 13, 1: 12, 5: 6, 2: 15, 3: 14}, [], [(0, 2, 0, 2), (3, 2, 0, 1)]),
    "nested": layout_of(
        {0: 22, 1: 20, 2: 18, 3: 17, 6: 12, 7: 13},
        [(5, 0, 2)],
        [(0, 4, 0, 2), (4, 2, 0, 1), (4, 2, 1, 2), (0, 2, 2, 3), (2, 2, 2, 1)],
    ),
}  # fmt: skip


def shared_table(layout: StepLayout, num_columns: int, generator: np.random.Generator) -> np.ndarray:
    """A page of its own for each entry, except the columns that groups share."""
    table = generator.permutation(8 * num_columns).astype(np.int32).reshape(8, num_columns)
    for first, count, column, columns in zip(
        layout.group_first_rows, layout.group_num_rows, layout.group_first_columns, layout.group_num_columns,
        strict=True,
    ):  # fmt: skip
        slots = layout.decode_slots[first : first + count]
        table[slots, column : column + columns] = table[slots[0], column : column + columns]
    return table


def allocate(ours: Any, num_pages: int, max_seqs: int, max_pages_per_seq: int) -> None:
    """Allocates short blocks and few programs for decode rows: some contexts are split, and no time goes into splits
    without a token, which the interpreter visits one by one."""
    from toka_engine.model.kernels.decode_attention import LaunchConfig, Workspace
    from toka_engine.model.kernels.prefix_groups import PrefixLaunchConfig, PrefixWorkspace

    ours.allocate(num_pages, PAGE_SIZE, max_seqs, max_pages_per_seq)
    shape, config = ours.shape, LaunchConfig(block_tokens=16, num_warps=4, num_programs=16)
    heads = shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.device
    ours._decode_work = Workspace.allocate(*heads, config)
    shared_cut = PrefixLaunchConfig(block_rows=16, block_tokens=16, num_warps=4, num_stages=1, residency=1)
    ours._prefix_work = PrefixWorkspace.allocate(*heads, shared_cut, num_programs=3)


def plan_padded(ours: Any, layout: StepLayout, num_rows: int) -> bool:
    """Plan decode rows as a graph holds them, with rows of the padding slot; whether there were groups for it."""
    groups, padding = ours.pack_graph_groups(layout), num_rows - layout.decode_slots.size

    def send(array: np.ndarray, filler: int | None = None) -> torch.Tensor:
        padded = array if filler is None else np.append(array, np.full(padding, filler, np.int32))
        return torch.from_numpy(padded).to(ours.shape.device)

    described = None if groups is None else (send(groups.suffix_starts, 0), send(groups.words))
    ours.bind_graph_inputs(send(layout.decode_slots, ours.scratch_slot), send(layout.decode_positions, 0), described)
    return groups is not None


@pytest.mark.parametrize("is_heads_first", rest_is_slow([True], [False, True]))
@pytest.mark.parametrize("name", LAYOUTS)
def test_each_mix_of_rows_gives_the_cpu_backends_result(name: str, is_heads_first: bool) -> None:
    from toka_engine.model.cuda.attention import CudaAttention
    from toka_engine.model.cuda.flashinfer_prefill import HND, NHD

    layout, columns = LAYOUTS[name], 6
    shape = AttentionShape(2, 6, 2, 32, 32**-0.5, torch.float32, torch.device("cpu"))
    ours = CudaAttention(shape, HND if is_heads_first else NHD, DefinedKernels(shape, is_heads_first))
    reference = CpuAttention(shape)
    generator = np.random.default_rng(3)
    table = shared_table(layout, columns, generator)
    slots, positions = np.repeat(int32(*range(8)), columns), np.tile(int32(*range(columns)), 8)
    allocate(ours, 8 * columns, 8, columns)
    reference.allocate(8 * columns, PAGE_SIZE, 8, columns)
    for backend in (ours, reference):
        backend.append_pages(slots, positions, table.reshape(-1))
    seeds = torch.Generator().manual_seed(5)
    angles = torch.randn(columns * PAGE_SIZE, 32, generator=seeds)
    past = torch.randn(2, 2, 8 * columns, PAGE_SIZE, 2, 32, generator=seeds)  # layer, k or v, page, token, head
    ours.cache[:, :, : 8 * columns] = past.transpose(3, 4) if is_heads_first else past
    reference._cache.copy_(past.permute(0, 2, 3, 1, 4, 5).reshape(reference._cache.shape))
    rows = layout.decode_slots.size + int(layout.prefill_lengths.sum())
    q = torch.randn(rows, 6, 32, generator=seeds)
    k, v = torch.randn(2, rows, 2, 32, generator=seeds)
    for backend in (ours, reference):
        backend.plan(layout)
    for layer in range(2):
        expected = reference.forward(layer, q, k, v, angles)
        torch.testing.assert_close(ours.forward(layer, q, k, v, angles), expected, atol=2e-5, rtol=1e-4)
    if layout.prefill_slots.size:
        return
    assert plan_padded(ours, layout, 8) == bool(layout.group_first_rows.size)
    padded = [torch.cat((each, torch.ones(8 - rows, *each.shape[1:]))) for each in (q, k, v)]
    torch.testing.assert_close(ours.forward(1, *padded, angles)[:rows], expected, atol=2e-5, rtol=1e-4)


def test_padding_rows_of_a_graph_leave_the_real_rows_and_pages_alone() -> None:
    from toka_engine.model.cuda.attention import CudaAttention
    from toka_engine.model.cuda.flashinfer_prefill import HND

    shape = AttentionShape(1, 4, 2, 32, 32**-0.5, torch.float32, torch.device("cpu"))
    ours = CudaAttention(shape, HND, DefinedKernels(shape, True))
    allocate(ours, 12, 4, 3)
    ours.cache[:, :, :12] = torch.randn(1, 2, 12, 2, PAGE_SIZE, 32, generator=torch.Generator().manual_seed(1))
    ours.append_pages(int32(0, 0, 2, 2), int32(0, 1, 0, 1), int32(3, 5, 3, 1))
    layout = layout_of({2: 6, 0: 5}, [], [(0, 2, 0, 1)])
    q, k, v = (torch.randn(4, heads, 32, generator=torch.Generator().manual_seed(2)) for heads in (4, 2, 2))
    angles = torch.randn(12, 32, generator=torch.Generator().manual_seed(3))
    ours.plan(layout)
    expected = ours.forward(0, q[:2], k[:2], v[:2], angles)
    pages = ours.cache[:, :, :12].clone()
    assert plan_padded(ours, layout, 4)
    result = ours.forward(0, q, k, v, angles)
    torch.testing.assert_close(result[:2], expected)
    assert torch.equal(ours.cache[:, :, :12], pages)
    assert not bool(result.isnan().any())


@pytest.mark.parametrize("is_heads_first", [False, True])
def test_without_a_plan_rows_find_their_pages_themselves(is_heads_first: bool) -> None:
    from toka_engine.model.cuda.attention import CudaAttention
    from toka_engine.model.cuda.flashinfer_prefill import HND, NHD

    shape = AttentionShape(2, 6, 2, 32, 32**-0.5, torch.float32, torch.device("cpu"))
    ours = CudaAttention(shape, HND if is_heads_first else NHD, DefinedKernels(shape, is_heads_first))
    allocate(ours, 12, 4, 3)
    seeds = torch.Generator().manual_seed(1)
    ours.cache[:, :, :12] = torch.randn(ours.cache[:, :, :12].shape, generator=seeds)
    ours.append_pages(int32(0, 0, 2, 2, 2), int32(0, 1, 0, 1, 2), int32(3, 5, 7, 1, 9))
    before = ours.cache.clone()
    q, k, v = (torch.randn(4, heads, 32, generator=seeds) for heads in (6, 2, 2))
    angles = torch.randn(12, 32, generator=seeds)
    ours.plan(layout_of({2: 11, 0: 5}, [], []))
    expected = ours.forward(1, q[:2], k[:2], v[:2], angles)
    written = ours.cache.clone()
    ours.cache.copy_(before)
    ours.bind_graph_inputs(
        torch.tensor([2, 0, 4, 4], dtype=torch.int32), torch.tensor([11, 5, 0, 0], dtype=torch.int32)
    )
    torch.testing.assert_close(ours.forward(1, q, k, v, angles)[:2], expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(ours.cache[:, :, :12], written[:, :, :12])
    assert not torch.equal(written, before)


@pytest.mark.parametrize("is_planned", [True, False])
def test_a_benchmark_can_skip_attention_and_nothing_else(is_planned: bool) -> None:
    from toka_engine.benchmarks.decoding import skip_attention
    from toka_engine.model.cuda.attention import CudaAttention
    from toka_engine.model.cuda.flashinfer_prefill import HND

    shape = AttentionShape(1, 4, 2, 32, 32**-0.5, torch.float32, torch.device("cpu"))
    ours = CudaAttention(shape, HND, DefinedKernels(shape, True))
    allocate(ours, 12, 4, 3)
    ours.append_pages(int32(0, 0, 2, 2), int32(0, 1, 0, 1), int32(3, 5, 7, 1))
    q, k, v = (torch.randn(2, heads, 32, generator=torch.Generator().manual_seed(2)) for heads in (4, 2, 2))
    angles = torch.randn(12, 32, generator=torch.Generator().manual_seed(3))
    if is_planned:
        ours.plan(layout_of({2: 6, 0: 5}, [], []))
    else:
        ours.bind_graph_inputs(torch.tensor([2, 0], dtype=torch.int32), torch.tensor([6, 5], dtype=torch.int32))
    expected = ours.forward(0, q, k, v, angles)
    written = ours.cache.clone()
    ours.cache.zero_()
    names = skip_attention(ours)
    assert not ours.forward(0, q, k, v, angles).any()
    assert torch.equal(ours.cache, written), "keys and values are written all the same"
    for name in names:
        delattr(ours, name)
    torch.testing.assert_close(ours.forward(0, q, k, v, angles), expected)
