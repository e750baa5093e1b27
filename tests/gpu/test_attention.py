"""The backend on the real kernels: flashinfer's give what the definition gives from the index arrays of our plans, and
decode rows, with what they share or without, get what the definition gives from their pages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from toka_engine.model.attention_backend import AttentionShape, StepLayout
from toka_engine.model.cuda.attention import CudaAttention
from toka_engine.model.cuda.flashinfer_prefill import HND, NHD
from toka_engine.model.kernels.rope_append import rope_append

from tests.unit.kernels.test_paged_attention import plan_padded

DEVICE = torch.device("cuda")
PAGE_SIZE, COLUMNS, SLOTS = 16, 24, 300


class Checked:
    """Passes each call on to the real kernels and compares their result with the definition in fp32."""

    def __init__(self, real: Any, shape: AttentionShape, is_heads_first: bool) -> None:
        self._real, self._shape, self._is_heads_first = real, shape, is_heads_first
        self.num_checked, self.worst = 0, 0.0

    def plan_queries(self, batch) -> Any:
        return self._real.plan_queries(batch)

    def run_queries(self, planned, q, cache, q_indptr, pages, out) -> None:
        out.fill_(float("nan"))
        self._real.run_queries(planned, q, cache, q_indptr, pages, out)
        keys, values = cache.transpose(2, 3) if self._is_heads_first else cache
        group = self._shape.num_heads // self._shape.num_kv_heads
        bounds, pages_of, last = q_indptr.tolist(), pages.kv_indptr.tolist(), pages.last_page_lens.tolist()
        for i in range(len(bounds) - 1):
            rows = slice(bounds[i], bounds[i + 1])
            chosen = pages.kv_indices[pages_of[i] : pages_of[i + 1]].long()
            length = (len(chosen) - 1) * PAGE_SIZE + last[i]
            k, v = (t[chosen].flatten(0, 1)[:length].float().repeat_interleave(group, 1) for t in (keys, values))
            scores = torch.einsum("qhd,nhd->qhn", q[rows].float(), k) * self._shape.scale
            count = bounds[i + 1] - bounds[i]
            seen = torch.arange(length)[None] <= torch.arange(length - count, length)[:, None]
            scores = scores.masked_fill(~seen[:, None].to(DEVICE), -torch.inf)
            expected = torch.einsum("qhn,nhd->qhd", scores.softmax(-1), v)
            error = float((out[rows].float() - expected).norm() / expected.norm())
            assert error < 8e-3, (i, error)
            self.num_checked, self.worst = self.num_checked + 1, max(self.worst, error)


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def layout_of(positions: np.ndarray, prefill: list[tuple[int, int, int]], groups: list[tuple[int, ...]]) -> StepLayout:
    table, chunks = np.array(groups, np.int32).reshape(-1, 4), np.array(prefill, np.int32).reshape(-1, 3)
    slots = np.arange(positions.size, dtype=np.int32)
    return StepLayout(slots, positions.astype(np.int32), *chunks.T.copy(), *table.T.copy())


def define_decode(backend: CudaAttention, layout: StepLayout, table: np.ndarray, q, k, v, angles) -> torch.Tensor:
    """Attention of the decode rows [d, num_heads, head_dim] in fp32, over the pages that a forward has left."""
    count, group = layout.decode_slots.size, q.shape[1] // k.shape[1]
    slots, positions = (torch.from_numpy(each).to(DEVICE) for each in (layout.decode_slots, layout.decode_positions))
    rotated = torch.empty_like(q[:count]).contiguous()
    cache = backend._by_token(backend.cache[0].to(q.dtype))  # a new token counts unrounded, earlier ones as stored
    rope_append(q[:count], k[:count], v[:count], angles, slots, positions, backend.table, *cache, rotated)
    result = torch.empty(rotated.shape, dtype=torch.float32, device=DEVICE)
    for row, (slot, position) in enumerate(zip(layout.decode_slots, layout.decode_positions, strict=True)):
        pages = torch.from_numpy(table[slot]).to(DEVICE).long()
        keys, values = (
            part[pages].flatten(0, 1)[: position + 1].float().repeat_interleave(group, dim=1) for part in cache
        )
        scores = torch.einsum("hd,nhd->hn", rotated[row].float(), keys) * backend.shape.scale
        result[row] = torch.einsum("hn,nhd->hd", scores.softmax(-1), values)
    return result


RANDOM = np.random.default_rng(0)
LAYOUTS = {
    "few rows": layout_of(int32(0, 15, 16, 383), [], []),
    "many rows": layout_of(RANDOM.integers(0, 384, 280), [], []),
    "one group": layout_of(RANDOM.integers(192, 384, 200), [], [(0, 200, 0, 12)]),
    "small group": layout_of(RANDOM.integers(200, 384, 9), [], [(2, 5, 0, 12)]),
    "nested with gaps": layout_of(
        RANDOM.integers(200, 384, 240),
        [(250, 0, 130), (251, 64, 200), (252, 300, 5)],
        [(0, 100, 0, 4), (130, 100, 0, 6), (0, 60, 4, 8), (130, 50, 6, 3), (180, 50, 6, 2), (140, 20, 9, 3)],
    ),
    "prefill": layout_of(int32(), [(1, 0, 384), (2, 100, 100), (3, 383, 1)], []),
}


@pytest.mark.parametrize("heads", [(32, 8, 64), (9, 3, 64), (14, 2, 64), (40, 8, 128)], ids=str)
@pytest.mark.parametrize(
    ("layout_code", "cache_dtype"),
    [(HND, None), (NHD, None), (HND, torch.float8_e4m3fn)],
    ids=["HND", "NHD", "HND-fp8"],
)
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_kernels_give_what_the_definition_gives(name, layout_code, cache_dtype, heads) -> None:
    num_heads, num_kv_heads, head_dim = heads
    shape = AttentionShape(1, num_heads, num_kv_heads, head_dim, head_dim**-0.5, torch.bfloat16, DEVICE, cache_dtype)
    backend = CudaAttention(shape, layout_code)
    backend.allocate(SLOTS * COLUMNS, PAGE_SIZE, SLOTS, COLUMNS)
    checked = backend._kernels = Checked(backend._kernels, shape, layout_code == HND)
    layout = LAYOUTS[name]
    table = RANDOM.permutation(SLOTS * COLUMNS).astype(np.int32).reshape(SLOTS, COLUMNS)
    for first, count, column, columns in zip(
        layout.group_first_rows,
        layout.group_num_rows,
        layout.group_first_columns,
        layout.group_num_columns,
        strict=True,
    ):
        slots = layout.decode_slots[first : first + count]
        table[slots, column : column + columns] = table[slots[0], column : column + columns]
    backend.append_pages(
        np.repeat(np.arange(SLOTS, dtype=np.int32), COLUMNS),
        np.tile(np.arange(COLUMNS, dtype=np.int32), SLOTS),
        table.reshape(-1),
    )
    backend.cache.copy_(torch.randn(backend.cache.shape, device=DEVICE))
    rows = layout.decode_slots.size + int(layout.prefill_lengths.sum())
    packed = torch.randn(rows, num_heads + 2 * num_kv_heads, head_dim, device=DEVICE).bfloat16()
    q, k, v = packed.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    angles = torch.randn(COLUMNS * PAGE_SIZE, head_dim, device=DEVICE)
    backend.plan(layout)
    merged = backend.forward(0, q, k, v, angles)
    assert checked.num_checked >= layout.prefill_slots.size
    expected = define_decode(backend, layout, table, q, k, v, angles)
    errors = (merged[: len(expected)].float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert not bool((errors >= 2e-2).any())
    backend.use_groups = False
    backend.plan(layout)
    alone = backend.forward(0, q, k, v, angles)
    assert float((merged - alone).float().norm() / alone.float().norm()) < 8e-3
    if layout.prefill_slots.size:
        return
    backend.use_groups = True
    backend._kernels = checked._real
    padding = 288 - rows
    padded = [torch.cat((t, torch.zeros_like(t[:1]).expand(padding, -1, -1))) for t in (q, k, v)]
    assert plan_padded(backend, layout, 288) == bool(layout.group_first_rows.size)
    replayed = backend.forward(0, *padded, angles)
    assert not bool(replayed.isnan().any())
    assert float((replayed[:rows] - alone).float().norm() / alone.float().norm()) < 8e-3
