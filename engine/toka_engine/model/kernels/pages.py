"""Kernels over the block table and pages: set entries, flatten rows, copy and widen pages, store token ids."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from toka_engine.model.kernels import cdiv


@triton.jit(do_not_specialize=["count", "columns"])
def _set_table_kernel(table_ptr, entries_ptr, count, columns, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    slot = tl.load(entries_ptr + index, mask=inside, other=0).to(tl.int64)
    column = tl.load(entries_ptr + count + index, mask=inside, other=0)
    page = tl.load(entries_ptr + 2 * count + index, mask=inside, other=0)
    tl.store(table_ptr + slot * columns + column, page, mask=inside)


def set_table(block_table: torch.Tensor, entries: torch.Tensor) -> None:
    """Set block_table[slots, columns] = pages, for entries [3 * n] int32: slots, then columns, then pages."""
    count = entries.shape[0] // 3
    if count:
        grid = (cdiv(count, 256),)
        _set_table_kernel[grid](block_table, entries, count, block_table.shape[1], BLOCK=256, num_warps=4)


@triton.jit(do_not_specialize=["columns"])
def _flatten_kernel(table_ptr, slots_ptr, first_ptr, indptr_ptr, out_ptr, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    begin = tl.load(indptr_ptr + row)
    count = tl.load(indptr_ptr + row + 1) - begin
    first = tl.load(first_ptr + row)
    source = table_ptr + tl.load(slots_ptr + row).to(tl.int64) * columns + first
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < count
        tl.store(out_ptr + begin + index, tl.load(source + index, mask=inside), mask=inside)


def flatten_table(
    block_table: torch.Tensor,  # [max_seqs, columns] int32
    slots: torch.Tensor,  # [rows] int32
    first_columns: torch.Tensor,  # [rows] int32
    indptr: torch.Tensor,  # [rows + 1] int32
    out: torch.Tensor,  # [>= indptr[-1]] int32
) -> None:
    """Set out[indptr[i]:indptr[i + 1]] = block_table[slots[i], first_columns[i]:] for each row i."""
    rows = slots.shape[0]
    if rows:
        _flatten_kernel[(rows,)](
            block_table, slots, first_columns, indptr, out, block_table.shape[1], BLOCK=128, num_warps=1
        )


@triton.jit(do_not_specialize=["pages"])
def _copy_pages_kernel(cache_ptr, source_ptr, target_ptr, pages, page_numel, BLOCK: tl.constexpr):
    copy = tl.program_id(0)
    plane = tl.program_id(1).to(tl.int64) * pages * page_numel
    source = plane + tl.load(source_ptr + copy).to(tl.int64) * page_numel
    target = plane + tl.load(target_ptr + copy).to(tl.int64) * page_numel
    for start in range(0, page_numel, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < page_numel
        tl.store(cache_ptr + target + index, tl.load(cache_ptr + source + index, mask=inside), mask=inside)


def copy_pages(cache: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy pages source[i] -> target[i] ([n] int32) in each plane of cache [planes, pages, page_numel], contiguous.

    No page may be both a source and a target of one call.
    """
    planes, pages, page_numel = cache.shape
    if source.shape[0]:
        grid = (source.shape[0], planes)
        _copy_pages_kernel[grid](cache, source, target, pages, page_numel, BLOCK=1024, num_warps=4)


@triton.jit
def _widen_pages_kernel(cache_ptr, pages_ptr, out_ptr, plane_stride, out_plane_stride, page_numel, BLOCK: tl.constexpr):
    index, plane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    source = plane * plane_stride + tl.load(pages_ptr + index).to(tl.int64) * page_numel
    target = plane * out_plane_stride + index.to(tl.int64) * page_numel
    for start in range(0, page_numel, BLOCK):
        within = start + tl.arange(0, BLOCK)
        inside = within < page_numel
        values = tl.load(cache_ptr + source + within, mask=inside, other=0.0)
        tl.store(out_ptr + target + within, values.to(out_ptr.dtype.element_ty), mask=inside)


def widen_pages(
    cache: torch.Tensor,  # [planes, pages, page_numel], contiguous
    pages: torch.Tensor,  # [n] int32
    out: torch.Tensor,  # [planes, >= n, page_numel], contiguous, written in its own dtype
) -> None:
    """Set out[:, i] = cache[:, pages[i]], in a dtype that has all values of the cache's."""
    planes, _, page_numel = cache.shape
    if pages.shape[0]:
        _widen_pages_kernel[(pages.shape[0], planes)](
            cache, pages, out, cache.stride(0), out.stride(0), page_numel, BLOCK=2048, num_warps=4
        )


@triton.jit(do_not_specialize=["columns", "rows"])
def _write_tokens_kernel(
    ids_ptr, slots_ptr, positions_ptr, table_ptr, columns, page_tokens_ptr, rows,
    PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    slot = tl.load(slots_ptr + row, mask=inside, other=0).to(tl.int64)
    position = tl.load(positions_ptr + row, mask=inside, other=0)
    page = tl.load(table_ptr + slot * columns + position // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
    token = tl.load(ids_ptr + row, mask=inside, other=0)
    tl.store(page_tokens_ptr + page * PAGE_SIZE + position % PAGE_SIZE, token, mask=inside)


def write_tokens(
    ids: torch.Tensor,  # [rows] int32
    slots: torch.Tensor,  # [rows] int32
    positions: torch.Tensor,  # [rows] int32
    block_table: torch.Tensor,  # [max_seqs, columns] int32
    page_tokens: torch.Tensor,  # [pages, page_size] int32
) -> None:
    """Set page_tokens[block_table[slots, positions // page_size], positions % page_size] = ids."""
    rows = ids.shape[0]
    if rows:
        _write_tokens_kernel[(cdiv(rows, 256),)](
            ids, slots, positions, block_table, block_table.shape[1], page_tokens, rows,
            PAGE_SIZE=page_tokens.shape[1], BLOCK=256, num_warps=4,
        )  # fmt: skip
