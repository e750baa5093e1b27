"""Fits the KV cache of a GPU into what the largest steps and the graphs leave, by measuring them.

The worker starts with a provisional cache, just large enough for the largest steps. They run, the largest graphs are
captured and dropped, and the real cache takes what is left. So whatever holds an address of the cache or of the block
table is made after `fit_cache`. Whoever sized the cache, memory that steps need is taken before ready (`take_spare`).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch

from toka_engine.errors import OutOfMemoryError
from toka_engine.messages import Int32s, Step, WorkerReady
from toka_engine.model.sizing import TOKEN_ID_BYTES, Sizes
from toka_engine.slot_parameters import SlotBatch

if TYPE_CHECKING:
    from toka_engine.model.cuda.attention import CudaAttention

logger = logging.getLogger("toka.model")

_MARGIN_BYTES = 512 << 20
_MARGIN_SHARE = 0.01
"""Share of the device's memory left for steps, which may find the memory of the largest ones fragmented."""
_LATE_BYTES = 384 << 20
"""Part of the margin that stays free for kernels that libraries load when they first need them."""
_TOP_LOGPROBS = 20
"""Top logprobs that a request may ask for by default."""
_SMALL_BYTES, _NUM_SMALL = 1 << 20, 64
"""PyTorch's allocator serves tensors up to 1 MiB from 2 MiB blocks; small steps hold more of them than the largest."""


def provisional_sizes(sizes: Sizes) -> Sizes:
    """Return `sizes` with as few pages as `make_largest_steps` needs."""
    num_chunks, _, pages_per_chunk = _cut_prefill(sizes)
    return replace(sizes, num_pages=num_chunks * pages_per_chunk)


def _cut_prefill(sizes: Sizes | WorkerReady) -> tuple[int, int, int]:
    """Return the largest prefill's number of chunks, tokens per chunk (the last may have fewer) and pages per chunk."""
    num_pages = max(1, min(sizes.max_pages_per_seq - 1, sizes.max_tokens_per_forward // sizes.page_size))
    # The last page of the longest sequence may reach beyond the model's positions.
    length = num_pages * sizes.page_size if sizes.max_pages_per_seq > 1 else 1
    length = min(length, sizes.max_tokens_per_forward)
    return min(-(-sizes.max_tokens_per_forward // length), sizes.max_seqs), length, num_pages


def make_largest_steps(ready: WorkerReady) -> list[Step]:
    """Make a prefill of as many tokens and a decode of as many rows as one forward may have. No page has an owner yet.

    The rows ask for all that takes memory: a filter, top logprobs, also of the prompts. If there are fewer pages than
    such a prefill has, chunks share them: nobody reads what they write.
    """
    num_tokens, num_logprobs = ready.max_tokens_per_forward, min(_TOP_LOGPROBS, ready.vocab_size)
    num_chunks, length, pages_per_chunk = _cut_prefill(ready)
    lengths = np.diff(np.minimum(np.arange(num_chunks + 1) * length, num_tokens)).astype(np.int32)
    chunks = np.arange(num_chunks, dtype=np.int32)
    columns = np.arange(num_chunks * pages_per_chunk, dtype=np.int32)
    prefill = Step(
        number=0,
        new=_ask_for_all(chunks, num_logprobs),
        append_slots=columns // pages_per_chunk,
        append_indices=columns % pages_per_chunk,
        append_pages=columns % ready.num_pages,
        prefill_slots=chunks,
        prefill_starts=np.zeros(num_chunks, np.int32),
        prefill_lengths=lengths,
        prefill_tokens=np.zeros(int(lengths.sum()), np.int32),
        fanout_slots=chunks,
        fanout_chunks=chunks,
        scored_chunks=chunks,
        scored_next=np.full(num_chunks, -1, np.int32),
        scored_counts=np.full(num_chunks, num_logprobs, np.int32),
    )
    num_rows = min(ready.max_seqs, num_tokens)
    # Slots without pages write to page 0, all of them to the same place: nobody reads it.
    rows = np.arange(num_rows, dtype=np.int32)
    decode = Step(number=0, new=_ask_for_all(rows, num_logprobs), decode_slots=rows)
    return [prefill, decode]


def _ask_for_all(slots: Int32s, num_logprobs: int) -> SlotBatch:
    return SlotBatch.of(slots, top_p=0.9, num_logprobs=num_logprobs)


def fit_cache(
    attention: CudaAttention,
    ready: WorkerReady,
    run: Callable[[Iterable[Step]], None],
    measure_graphs: Callable[[], int],
    agree_min: Callable[[int], int],
) -> WorkerReady:
    """Measure, allocate the real cache in the place of the provisional one, and return the final sizes.

    `run` executes steps; `measure_graphs` gives the bytes that graphs will take; `agree_min` gives the smallest value
    of all tensor parallel ranks. Raises OutOfMemoryError if not even one page is left.
    """
    device = attention.shape.device
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run(make_largest_steps(ready))
    step_bytes = torch.cuda.max_memory_allocated(device) - before
    graph_bytes = measure_graphs()
    attention.release()
    gc.collect()
    torch.cuda.empty_cache()
    (free, _), margin = torch.cuda.mem_get_info(device), _find_margin(device)
    available = free - step_bytes - graph_bytes - margin
    bytes_per_page = (attention.shape.kv_bytes_per_token + TOKEN_ID_BYTES) * ready.page_size
    num_pages = agree_min(available // bytes_per_page - 1)  # one is the backend's own
    logger.info(
        "event=memory free_gb=%.2f largest_step_gb=%.2f graphs_gb=%.2f margin_gb=%.2f pages=%d",
        *(value / 1e9 for value in (free, step_bytes, graph_bytes, margin)),
        num_pages,
    )
    if num_pages < 1:
        raise OutOfMemoryError(
            f"no room for a KV cache: {free / 1e9:.1f} GB of GPU memory are free beside the weights, the largest step "
            f"takes {step_bytes / 1e9:.1f} GB and graphs {graph_bytes / 1e9:.1f} GB; lower max_tokens_per_forward or "
            "max_seqs_per_forward"
        )
    fitted = msgspec.structs.replace(
        ready, num_pages=num_pages, max_pages_per_seq=min(ready.max_pages_per_seq, num_pages)
    )
    attention.allocate(num_pages, ready.page_size, ready.max_seqs, fitted.max_pages_per_seq)
    return fitted


def take_spare(device: torch.device) -> None:
    """Have torch take now what steps may need, so that it takes nothing after ready: it keeps what tensors leave.

    Called after the capture of graphs, before each of which torch gives back what is free, and after the largest
    steps: what is left of the margin is for steps that leave their memory in pieces.
    """
    small = [torch.empty(_SMALL_BYTES, dtype=torch.uint8, device=device) for _ in range(_NUM_SMALL)]
    free, _ = torch.cuda.mem_get_info(device)
    spare = min(free, _find_margin(device)) - _LATE_BYTES
    large = torch.empty(max(0, spare), dtype=torch.uint8, device=device)
    del small, large


def _find_margin(device: torch.device) -> int:
    return _MARGIN_BYTES + int(torch.cuda.mem_get_info(device)[1] * _MARGIN_SHARE)
