"""The numbers of rows that CUDA graphs are captured for, and the memory that captures take."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

_SMALL_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128)
_STEPS = ((512, 32), (2048, 128), (1 << 30, 256))
"""Distance between sizes, as (up to this size, distance)."""
_LAYER_STEPS = ((128, 32), (1024, 64), (1 << 30, 128))
"""The same of layer graphs: GEMMs compute tiles of 64 and 128 rows anyway."""


def graph_sizes(max_rows: int) -> list[int]:
    """Return the batch sizes to capture: close together where a row of padding costs most; the last is max_rows."""
    return _extend(list(_SMALL_SIZES), _STEPS, max_rows)


def layer_graph_sizes(max_rows: int) -> list[int]:
    """Return the numbers of rows of steps with prompts whose layers are captured, ascending; the last is max_rows."""
    return _extend([_LAYER_STEPS[0][1]], _LAYER_STEPS, max_rows)


def _extend(sizes: list[int], steps: Sequence[tuple[int, int]], max_rows: int) -> list[int]:
    while sizes[-1] < max_rows:
        sizes.append(sizes[-1] + next(step for limit, step in steps if sizes[-1] < limit))
    return [size for size in sizes if size < max_rows] + [max_rows]


def measure_captures(sizes: Sequence[int], capture: Callable[[int], None]) -> int:
    """Estimate the device bytes of capturing all ascending `sizes` in one pool, from the two largest.

    These share little with each other; all others fit into their memory.
    """
    free = [_read_free_bytes()]
    for size in sizes[:-3:-1]:
        capture(size)
        free.append(_read_free_bytes())
    if len(free) < 3:
        return free[0] - free[-1]
    return free[0] - free[1] + (free[1] - free[2]) * (len(sizes) - 1)


def _read_free_bytes() -> int:
    """Return the device's free bytes after torch has released its cached blocks."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])
