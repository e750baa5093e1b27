"""Paged attention on a CPU: gathered pages and torch's flash kernel, which also gives the log-sum-exp.

Decode rows and prefill chunks are both *spans* here: query rows of one slot over some of its pages. Spans of similar
size are computed together, so that Python's cost grows with the number of buckets, not of sequences. Hydragen (Juravsky
et al. 2024): a group's shared prefix is attended to once with all its rows as queries, each row's suffix by its own
span, and the parts are merged by their log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from toka_engine.model.attention_backend import AttentionShape, StepLayout
from toka_engine.model.cpu.attention_spans import Bucket, make_buckets, spans_of
from toka_engine.model.step_rows import find_rows

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@dataclass(frozen=True, slots=True)
class _Group:
    """A Hydragen group: decode rows [first, first + num) over shared full pages."""

    first_row: int
    num_rows: int
    pages: torch.Tensor  # [n] int64


@dataclass(slots=True)
class _Plan:
    buckets: list[Bucket]
    groups: list[_Group]
    positions: torch.Tensor  # [T] int64
    cache_rows: torch.Tensor  # [T] int64: where each row's k and v go, as a token index into the cache
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None
    """Cosines and signed sines [T, 1, head_dim] of the positions; made by the first layer."""


class CpuAttention:
    """An AttentionBackend. The cache is [layers, pages, page_size, 2, num_kv_heads, head_dim]: k, then v, per token."""

    def __init__(self, shape: AttentionShape) -> None:
        self._shape = shape
        self._width = 2 * shape.num_kv_heads * shape.head_dim
        self._plan: _Plan | None = None
        self._scratch = torch.empty(0, dtype=shape.dtype)

    def allocate(self, num_pages: int, page_size: int, max_seqs: int, max_pages_per_seq: int) -> None:
        shape = self._shape
        self._page_size = page_size
        # Zeroed lazily by the kernel: pages that are never used take no memory.
        num_bytes = shape.num_layers * num_pages * page_size * self._width * shape.dtype.itemsize
        cache = torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(shape.dtype)
        self._cache = cache.view(shape.num_layers, num_pages, page_size, self._width)
        self._pages_of_layer = [self._cache[layer].view(num_pages, -1) for layer in range(shape.num_layers)]
        self._rows_of_layer = [self._cache[layer].view(-1, self._width) for layer in range(shape.num_layers)]
        self._page_tokens: NDArray[np.int32] = np.zeros((num_pages, page_size), np.int32)
        self._table: NDArray[np.int32] = np.zeros((max_seqs, max_pages_per_seq), np.int32)

    def append_pages(self, slots: NDArray[np.int32], columns: NDArray[np.int32], pages: NDArray[np.int32]) -> None:
        self._table[slots, columns] = pages

    def copy_pages(self, source: NDArray[np.int32], target: NDArray[np.int32]) -> None:
        self._cache[:, target.astype(np.int64)] = self._cache[:, source.astype(np.int64)]
        self._page_tokens[target] = self._page_tokens[source]

    def plan(self, layout: StepLayout) -> None:
        page_size = self._page_size
        slots, narrow_positions = find_rows(layout)
        positions = narrow_positions.astype(np.int64)
        pages = self._table[slots, positions // page_size].astype(np.int64)
        offsets = positions % page_size
        # A page's tail must be finite: masked keys are multiplied by zero, and zero times NaN is NaN.
        fresh = pages[offsets == 0]
        if fresh.size:
            self._cache[:, torch.from_numpy(fresh)] = 0
        spans = spans_of(layout, page_size)
        self._plan = _Plan(
            buckets=make_buckets(spans, self._table, page_size, self._shape),
            groups=self._make_groups(layout),
            positions=torch.from_numpy(positions),
            cache_rows=torch.from_numpy(pages * page_size + offsets),
        )

    def write_tokens(self, ids: torch.Tensor) -> None:
        assert self._plan is not None, "write_tokens without plan"
        self._page_tokens.reshape(-1)[self._plan.cache_rows.numpy()] = ids.numpy()

    def read_tokens(self, slots: NDArray[np.int32], lengths: NDArray[np.int32]) -> NDArray[np.int64]:
        """Return the first lengths[i] tokens of each of `slots` [k], concatenated [sum(lengths)]."""
        owners = np.repeat(slots, lengths)
        ends = np.cumsum(lengths, dtype=np.int64)
        positions = np.arange(owners.size) - np.repeat(ends - lengths, lengths)
        columns, offsets = np.divmod(positions, self._page_size)
        return self._page_tokens[self._table[owners, columns], offsets].astype(np.int64)

    def find_tokens(self, slots: NDArray[np.int32], positions: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the tokens of `slots` [k] at `positions` [k]."""
        columns, offsets = np.divmod(positions, self._page_size)
        return self._page_tokens[self._table[slots, columns], offsets]

    def forward(
        self,
        layer: int,
        q: torch.Tensor,  # [T, num_heads, head_dim], before RoPE
        k: torch.Tensor,  # [T, num_kv_heads, head_dim], before RoPE
        v: torch.Tensor,  # [T, num_kv_heads, head_dim]
        cos_sin: torch.Tensor,  # [max_positions, head_dim] fp32
    ) -> torch.Tensor:
        """See AttentionBackend."""
        plan, shape = self._plan, self._shape
        assert plan is not None, "forward without plan"
        if plan.rotation is None:
            plan.rotation = _gather_rotation(cos_sin, plan.positions)
        q, k = _rotate(q, plan.rotation), _rotate(k, plan.rotation)
        rows = torch.cat((k, v), dim=1).view(-1, self._width)
        self._rows_of_layer[layer].index_copy_(0, plan.cache_rows, rows)
        if len(plan.buckets) == 1 and not plan.groups and plan.buckets[0].covers_all_in_order:
            return self._attend_bucket(layer, q, plan.buckets[0])[0]
        out = torch.empty_like(q)
        lse = torch.empty((q.shape[0], shape.num_heads) if plan.groups else (0, 0), dtype=torch.float32)
        for bucket in plan.buckets:
            part, part_lse = self._attend_bucket(layer, q.index_select(0, bucket.q_rows), bucket)
            if bucket.valid is not None:
                part, part_lse = part[bucket.valid], part_lse[bucket.valid]
            out.index_copy_(0, bucket.out_rows, part)
            if plan.groups:
                lse.index_copy_(0, bucket.out_rows, part_lse)
        for group in plan.groups:
            self._merge_group(layer, q, group, out, lse)
        return out

    def _attend_bucket(self, layer: int, q: torch.Tensor, bucket: Bucket) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend with q [num_spans * max_q, heads, d]: out of the same shape, lse [num_spans * max_q, heads]."""
        return self._attend(layer, q, bucket.pages, bucket.num_spans, bucket.mask)

    def _attend(
        self,
        layer: int,
        q: torch.Tensor,  # [num_spans * num_q, num_heads, head_dim]
        pages: torch.Tensor,  # [num_spans * num_pages] int64
        num_spans: int,
        mask: torch.Tensor | None,  # [num_spans, 1, num_q * group, num_pages * page_size]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out, like q, and the log-sum-exp [num_spans * num_q, num_heads] fp32 (natural logarithm)."""
        shape = self._shape
        kv_heads, group, dim = shape.num_kv_heads, shape.num_heads // shape.num_kv_heads, shape.head_dim
        num_q = q.shape[0] // num_spans
        gathered = self._gather(layer, pages).view(num_spans, -1, 2, kv_heads, dim)
        keys, values = gathered[:, :, 0].transpose(1, 2), gathered[:, :, 1].transpose(1, 2)
        # Query heads of one kv head become query rows: row r of span s is token r // group, head r % group.
        folded = q.view(num_spans, num_q, kv_heads, group, dim).transpose(1, 2)
        folded = folded.reshape(num_spans, kv_heads, num_q * group, dim)
        out, lse = _flash(folded, keys, values, 0.0, False, attn_mask=mask, scale=shape.scale)
        out = out.view(num_spans, kv_heads, num_q, group, dim).transpose(1, 2)
        lse = lse.view(num_spans, kv_heads, num_q, group).transpose(1, 2)
        return out.reshape(-1, shape.num_heads, dim), lse.reshape(-1, shape.num_heads)

    def _gather(self, layer: int, pages: torch.Tensor) -> torch.Tensor:
        """Copy pages [n] of a layer to scratch: [n, page_size * 2 * num_kv_heads * head_dim]."""
        cache = self._pages_of_layer[layer]
        needed = pages.shape[0] * cache.shape[1]
        if self._scratch.numel() < needed:
            self._scratch = torch.empty(needed, dtype=cache.dtype)
        out = self._scratch[:needed].view(pages.shape[0], cache.shape[1])
        return torch.index_select(cache, 0, pages, out=out)

    def _make_groups(self, layout: StepLayout) -> list[_Group]:
        groups = []
        for first_row, num_rows, column, num_columns in zip(
            layout.group_first_rows.tolist(),
            layout.group_num_rows.tolist(),
            layout.group_first_columns.tolist(),
            layout.group_num_columns.tolist(),
            strict=True,
        ):
            pages = self._table[layout.decode_slots[first_row], column : column + num_columns]
            groups.append(_Group(first_row, num_rows, torch.from_numpy(pages.astype(np.int64))))
        return groups

    def _merge_group(self, layer: int, q: torch.Tensor, group: _Group, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Attend to the group's shared prefix once and merge the result into its rows of `out` and `lse`."""
        rows = slice(group.first_row, group.first_row + group.num_rows)
        part, part_lse = self._attend(layer, q[rows], group.pages, 1, None)
        total = torch.logaddexp(lse[rows], part_lse)
        weight = torch.exp(part_lse - total).unsqueeze(2)
        out[rows] = torch.lerp(out[rows].float(), part.float(), weight).to(out.dtype)
        lse[rows] = total


def _gather_rotation(cos_sin: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines (first half negated) of positions [T], [T, 1, head_dim] each, for `_rotate`."""
    cos, sin = cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, dim=2)
    return torch.cat((cos, cos), dim=2), torch.cat((-sin, sin), dim=2)


def _rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate x [T, heads, head_dim] in fp32: x * cos + swap_halves(x) * sin, contiguous, in x's dtype."""
    wide = x.float()
    swapped = torch.roll(wide, x.shape[2] // 2, 2)
    return torch.addcmul(wide * rotation[0], swapped, rotation[1]).to(x.dtype)
