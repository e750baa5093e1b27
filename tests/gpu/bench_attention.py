"""Times the decode attention of one layer at the 1B shape: layouts, page sizes, with and without tensor cores."""

from __future__ import annotations

import numpy as np
import torch
from toka_engine.model.attention.base import AttentionShape
from toka_engine.model.attention.paged_plan import list_pages
from toka_engine.model.kernels.paged import HND, NHD, DevicePages, PagedKernels
from triton.testing import do_bench

DEVICE = torch.device("cuda")
SHAPE = AttentionShape(1, 32, 8, 64, 64**-0.5, torch.bfloat16, DEVICE)


def time(rows: int, tokens: int, layout: int, page_size: int, is_plain: bool) -> tuple[float, float]:
    """Microseconds of one layer, and bytes of keys and values per second."""
    kernels = PagedKernels(SHAPE, page_size, layout)
    kernels.has_plain_decode = is_plain
    per_row = -(-tokens // page_size)
    page = (8, page_size) if layout == HND else (page_size, 8)
    cache = torch.randn(2, rows * per_row, *page, 64, device=DEVICE, dtype=torch.bfloat16)
    zeros = np.zeros(rows, np.int32)
    pages = list_pages(zeros, zeros, np.full(rows, tokens, np.int32), page_size)
    device_pages = DevicePages(
        torch.from_numpy(pages.kv_indptr).to(DEVICE),
        torch.randperm(rows * per_row, device=DEVICE).int(),
        torch.from_numpy(pages.last_page_lens).to(DEVICE),
    )
    q = torch.randn(rows, 32, 64, device=DEVICE, dtype=torch.bfloat16)
    out, q_indptr = torch.empty_like(q), torch.arange(rows + 1, device=DEVICE, dtype=torch.int32)
    plan = kernels.plan_decode(pages, False)
    took_ms = do_bench(
        lambda: kernels.run_decode(plan, q, cache, device_pages, q_indptr, out, None),
        warmup=5, rep=20, return_mode="median",
    )  # fmt: skip
    return took_ms * 1e3, rows * tokens * 2048 / took_ms * 1e3


def main() -> None:
    for rows, tokens in ((4096, 332), (4096, 108), (1024, 524), (256, 524), (64, 524), (1, 524)):
        for layout in (HND, NHD):
            for page_size in (16, 32):
                for is_plain in (True, False):
                    took_us, rate = time(rows, tokens, layout, page_size, is_plain)
                    name = f"{rows} x {tokens} {'HND' if layout == HND else 'NHD'} page {page_size}"
                    kind = "plain" if is_plain else "tensor cores"
                    print(f"{name:28s} {kind:14s} {took_us:8.1f} us {rate / 1e12:6.2f} TB/s", flush=True)


if __name__ == "__main__":
    main()
