"""Host side of attention to shared prefixes: packed groups, the launch config, and scratch memory. Mostly numpy.

The work of all groups is divided into units, each a block of keys for a tile of query heads, and each program takes an
equal share of units, across tiles: the host computes only running sums. Seen from here the two kernels,
`prefix_attention` for any GPU and `prefix_hopper`, differ in the sizes of tiles and blocks and in a tile's extra cost
(`PrefixLaunchConfig`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from toka_engine.model.kernels import HOPPER_CAPABILITY, count_processors
from toka_engine.model.kernels.decode_attention import find_capability, has_pdl

HEADER = 8
"""int32 words before the arrays: number of groups, of units, units per program, the arrays' capacity, KV heads, query
heads per KV head; two unused."""
ARRAYS = 6
"""Number of arrays [capacity]: first_rows, num_rows, slots, first_columns, num_columns, unit_ends (running sums)."""
_MIN_UNITS = 4
"""Fewest units for which starting a program pays."""
_SLACK = 16
"""A program's share may exceed the equal share by 1 / _SLACK, if tiles are then split evenly or not at all."""


@dataclass(frozen=True, slots=True)
class PrefixLaunchConfig:
    """Sizes of tiles and blocks, and resources of a program. They change the result by the order of sums only."""

    block_rows: int  # (row, query head) pairs per tile; 64 or 128, or 64 for each warpgroup
    block_tokens: int  # keys and values per block; a power of 2, at least 16
    num_warps: int
    num_stages: int  # blocks of keys and values in flight or in use
    residency: int  # programs that an SM's registers and shared memory hold at once
    max_registers: int | None = None  # per thread, so that `residency` programs fit
    num_warpgroups: int = 0
    """3 in the Hopper kernel, of `num_warps` warps and a third of block_rows each; 0 selects the kernel for any GPU."""
    tile_cost: int = 0
    """Units that a tile counts for besides its blocks, in the Hopper kernel only: starting and ending a tile takes
    time, so a program with more tiles gets fewer blocks."""

    def __post_init__(self) -> None:
        if self.tile_cost and not self.num_warpgroups:
            raise ValueError(f"tile_cost: {self.tile_cost}, but the kernel for any GPU counts blocks alone")

    @classmethod
    def of(cls, head_dim: int) -> PrefixLaunchConfig:
        """Return the config for any GPU. For heads of 64 and 128: the fastest of bench_prefix_attention on an H100.

        A program takes up to 99 KB of shared memory, which every GPU from sm_80 on has; an H100 holds `residency`.
        """
        if head_dim <= 64:
            return cls(block_rows=128, block_tokens=64, num_warps=8, num_stages=3, residency=2, max_registers=128)
        if head_dim <= 128:
            return cls(block_rows=128, block_tokens=64, num_warps=8, num_stages=2, residency=2, max_registers=128)
        return cls(block_rows=64, block_tokens=32, num_warps=4, num_stages=2, residency=2)

    @classmethod
    def choose(
        cls, head_dim: int, page_size: int, is_heads_first: bool, has_fp8_cache: bool = False
    ) -> PrefixLaunchConfig:
        """Return the best config for the GPU that Triton compiles for.

        The Hopper kernel copies whole pages of a head, of at least 8 rows, as its swizzle requires, straight into the
        memory that tensor cores read: it takes no cache of 8-bit floats.
        """
        is_copied_whole = is_heads_first and page_size % 8 == 0 and head_dim in (64, 128) and not has_fp8_cache
        if is_copied_whole and find_capability() == HOPPER_CAPABILITY:
            config = cls.for_hopper(head_dim)
            if config.block_tokens % page_size == 0:
                return config
        return cls.over_fp8() if has_fp8_cache else cls.of(head_dim)

    @classmethod
    def over_fp8(cls) -> PrefixLaunchConfig:
        """Return the config for a cache of 8-bit floats: the best over all sizes of tests/gpu/bench_fp8_cache.py."""
        return cls(block_rows=64, block_tokens=64, num_warps=4, num_stages=3, residency=2)

    @classmethod
    def for_hopper(cls, head_dim: int) -> PrefixLaunchConfig:
        """Return the Hopper kernel's config, for heads of 64 and 128. It uses all registers: 128 has smaller blocks."""
        if head_dim not in (64, 128):
            raise ValueError(f"head_dim: {head_dim} is neither 64 nor 128")
        return cls(
            block_rows=192,
            block_tokens=128 if head_dim == 64 else 64,
            num_warps=4,
            num_stages=4,
            residency=1,
            max_registers=160,
            num_warpgroups=3,
            tile_cost=1,
        )


@dataclass(frozen=True, slots=True)
class PrefixWorkspace:
    """Partial results of tiles. Launches that follow each other in a stream may share it."""

    sums: torch.Tensor  # [2 * num_programs, block_rows, head_dim] fp32: weighted sums of values
    scales: torch.Tensor  # [2 * num_programs, 2, block_rows] fp32: greatest score in base 2, sum of weights
    arrived: torch.Tensor
    """[num_programs, max(1, num_warpgroups)] int32 counters, by the program that begins a tile; 0 between launches."""
    config: PrefixLaunchConfig
    num_heads: int
    num_kv_heads: int
    has_pdl: bool  # programmatic dependent launch

    @property
    def num_programs(self) -> int:
        return self.arrived.shape[0]

    @classmethod
    def allocate(
        cls,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device,
        config: PrefixLaunchConfig | None = None,
        num_programs: int | None = None,
    ) -> PrefixWorkspace:
        """Allocate for any groups; by default `num_programs` is what the device runs at once."""
        config = config or PrefixLaunchConfig.of(head_dim)
        programs = num_programs or config.residency * count_processors(device)
        return cls(
            sums=torch.empty(2 * programs, config.block_rows, head_dim, dtype=torch.float32, device=device),
            scales=torch.empty(2 * programs, 2, config.block_rows, dtype=torch.float32, device=device),
            arrived=torch.zeros(programs, max(1, config.num_warpgroups), dtype=torch.int32, device=device),
            config=config,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            has_pdl=has_pdl(),
        )


def packed_size(capacity: int) -> int:
    """Return how many int32 words describe up to `capacity` groups."""
    return HEADER + ARRAYS * capacity


def pack_groups(
    work: PrefixWorkspace,
    page_size: int,
    first_rows: NDArray[np.int32],  # [n]
    num_rows: NDArray[np.int32],  # [n] at least 1: the rows of a group follow each other
    slots: NDArray[np.int32],  # [n] whose row of the block table holds the pages
    first_columns: NDArray[np.int32],  # [n]
    num_columns: NDArray[np.int32],  # [n] whole pages, at least 1
    capacity: int | None = None,  # n if not given
) -> NDArray[np.int32]:
    """Pack groups into [packed_size(capacity)] int32 words for `attend_prefix`. No two groups share a row.

    Raises ValueError if there are more than `capacity` groups.
    """
    count, config = first_rows.size, work.config
    capacity = max(1, count) if capacity is None else capacity
    if count > capacity:
        raise ValueError(f"first_rows: {count} groups, but capacity={capacity}")
    words = np.zeros(packed_size(capacity), np.int32)
    words[3:6] = capacity, work.num_kv_heads, work.num_heads // work.num_kv_heads
    if count:
        blocks = -(-num_columns.astype(np.int64) * page_size // config.block_tokens)
        tiles = -(-num_rows.astype(np.int64) * (work.num_heads // work.num_kv_heads) // config.block_rows)
        units = blocks + config.tile_cost
        unit_ends = np.cumsum(units * tiles * work.num_kv_heads)
        words[:3] = count, unit_ends[-1], _choose_share(int(unit_ends[-1]), units, work.num_programs)
        arrays = words[HEADER:].reshape(ARRAYS, capacity)
        for array, values in zip(
            arrays, (first_rows, num_rows, slots, first_columns, num_columns, unit_ends), strict=True
        ):
            array[:count] = values
    return words


def _choose_share(total: int, units: NDArray[np.int64], num_programs: int) -> int:
    """Return the units of each program but the last, of `total`. `units` [n]: of one tile, by group.

    This is an equal share, but not so small that merging a tile's parts in sequence takes longer than it saves (by an
    estimate: half a unit's time for each), and slightly more than equal if tiles then end where programs do.
    """
    most = int(units.max())
    equal = max(-(-total // num_programs), _MIN_UNITS, math.isqrt(most // 2))
    if equal >= most:
        even = -(-equal // most) * most
    else:
        pieces = most // equal
        while most % pieces:
            pieces -= 1
        even = most // pieces
    return even if int(units.min()) == most and even - equal <= equal // _SLACK else equal
