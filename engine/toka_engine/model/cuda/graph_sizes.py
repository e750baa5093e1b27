"""The numbers of rows that CUDA graphs are captured for, and the memory that captures take."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from toka_engine.config import EngineConfig
from toka_engine.model.model_config import ModelConfig

_SMALL_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128)
_STEPS = ((512, 32), (2048, 128), (1 << 30, 256))
"""Distance between sizes, as (up to this size, distance)."""
_LAYER_STEPS = ((128, 32), (1024, 64), (1 << 30, 128))
"""The same of layer graphs: GEMMs compute tiles of 64 and 128 rows anyway."""

_NUM_MEASURED, _NUM_DIVIDING = 4, 2
"""Captures that memory is measured of; those behind the first ones stand for all that are not measured."""
_MOST_LAYER_ROWS = 1024
_MOST_LAYER_PRODUCTS = 112e9
"""Multiply-adds of a layer's products, 512 rows of an 8B: with more the device takes longer for a layer than the host
for launching it (0.28 ms on an H200), and graphs gain nothing."""


def choose_layer_rows(config: EngineConfig, model: ModelConfig) -> int:
    """Return up to how many rows a step with prompts has the graphs of `layer_graph_sizes`, 0 for none of them.

    That is what the user asked for; if nothing, as many rows as the host takes longer for than the device, which is
    twice as many where weights are 8-bit floats.
    """
    if config.cudagraph_max_prefill_size is not None:
        return config.cudagraph_max_prefill_size
    heads, mlp = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim, 3 * model.intermediate_size
    weights_per_layer = model.hidden_size * (heads + mlp) // config.tp_size
    is_fp8 = config.quantization == "fp8" or (config.quantization == "auto" and model.quantization is not None)
    step, products = _LAYER_STEPS[1][1], _MOST_LAYER_PRODUCTS * (2 if is_fp8 else 1)
    return min(_MOST_LAYER_ROWS, max(step, int(products / weights_per_layer) // step * step))


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
    """Estimate the device bytes of capturing all ascending `sizes` in one pool, from the largest of them.

    The largest takes memory that the others fit into, though the next ones may find it divided so that they take some
    more. What is left after them is what a graph takes as such.
    """
    free = [_read_free_bytes()]
    for size in sizes[: -_NUM_MEASURED - 1 : -1]:
        capture(size)
        free.append(_read_free_bytes())
    taken = [before - after for before, after in itertools.pairwise(free)]
    return sum(taken) + (len(sizes) - len(taken)) * max(taken[_NUM_DIVIDING:], default=0)


def _read_free_bytes() -> int:
    """Return the device's free bytes after torch has released its cached blocks."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])
