"""What launches of attention over shared tokens are told and what they share: groups, the cut of work, room for parts.

The work of all groups is cut into units of a block of keys for a tile of query heads, and each program takes an equal
share of units, whatever tiles they are of: the host plans nothing but running sums. The two kernels, `prefix_attention`
for any GPU and `prefix_hopper`, differ in how large a tile and a block are, in what a tile costs beside (`SharedCut`),
and in nothing else that is seen from here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from toka_engine.model.kernels import HOPPER_CAPABILITY
from toka_engine.model.kernels.decode_attention import find_capability, has_pdl

HEADER = 8
"""int32 words in front of the arrays: how many groups, of how many units, units a program, the arrays' capacity, KV
heads, query heads to each; two unused."""
ARRAYS = 6
"""Each [capacity]: first_rows, num_rows, slots, first_columns, num_columns, unit_ends (running sums)."""
_MIN_UNITS = 4
"""Units below which a program is not worth its start."""
_SLACK = 16
"""A share may grow by one part in so many, if tiles are then cut evenly or not at all."""
_USUAL_PROCESSORS = 132
"""Where no GPU says how many it has: an H100's."""


@dataclass(frozen=True, slots=True)
class SharedCut:
    """How the work is cut; nothing of it changes what is computed, but for the order of sums."""

    block_rows: int  # pairs of a row and a query head to a tile; 64 or 128, or 64 for each warpgroup
    block_tokens: int  # keys and values to a block; a power of 2, at least 16
    num_warps: int
    num_stages: int  # blocks of keys and values on their way or worked on
    residency: int  # programs that a processor's registers and shared memory hold at once
    max_registers: int | None = None  # of a thread, so that `residency` programs fit
    num_warpgroups: int = 0
    """In the kernel for Hopper 3, of `num_warps` warps, which multiply a third of block_rows each; 0: the other one."""
    tile_cost: int = 0
    """Units that a tile counts for beside its blocks, in the kernel for Hopper alone: beginning and ending a tile takes
    its time, so a program that has more of them gets fewer blocks."""

    def __post_init__(self) -> None:
        if self.tile_cost and not self.num_warpgroups:
            raise ValueError(f"tile_cost: {self.tile_cost}, but the kernel for any GPU counts blocks alone")

    @classmethod
    def of(cls, head_dim: int) -> SharedCut:
        """For heads of 64 and 128 the best of those that tests/gpu/bench_shared_attention.py timed on an H100.

        Up to 99 KB of shared memory a program, which every GPU from sm_80 on has, and on an H100 `residency` of them.
        """
        if head_dim <= 64:
            return cls(block_rows=128, block_tokens=64, num_warps=8, num_stages=3, residency=2, max_registers=128)
        if head_dim <= 128:
            return cls(block_rows=128, block_tokens=64, num_warps=8, num_stages=2, residency=2, max_registers=128)
        return cls(block_rows=64, block_tokens=32, num_warps=4, num_stages=2, residency=2)

    @classmethod
    def choose(cls, head_dim: int, page_size: int, is_heads_first: bool) -> SharedCut:
        """The best for the GPU that Triton compiles for. Hopper's copies are of whole pages of a head, 8 rows at least,
        as their swizzle has it."""
        is_copied_whole = is_heads_first and page_size % 8 == 0 and head_dim in (64, 128)
        if is_copied_whole and find_capability() == HOPPER_CAPABILITY:
            cut = cls.for_hopper(head_dim)
            if cut.block_tokens % page_size == 0:
                return cut
        return cls.of(head_dim)

    @classmethod
    def for_hopper(cls, head_dim: int) -> SharedCut:
        """For heads of 64 and 128. As many registers as there are, so heads of 128 have smaller blocks."""
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
class SharedWorkspace:
    """Where programs leave parts of tiles. Launches that follow each other in a stream may share it."""

    sums: torch.Tensor  # [2 * num_programs, block_rows, head_dim] fp32: weighted sums of values
    scales: torch.Tensor  # [2 * num_programs, 2, block_rows] fp32: greatest score in base 2, sum of weights
    arrived: torch.Tensor
    """[num_programs, max(1, num_warpgroups)] int32, by the program that begins a tile; zeros between launches."""
    cut: SharedCut
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
        cut: SharedCut | None = None,
        num_programs: int | None = None,
    ) -> SharedWorkspace:
        """For any groups; `num_programs` is what the device runs at once, if not given."""
        cut = cut or SharedCut.of(head_dim)
        programs = num_programs or cut.residency * _count_processors(device)
        return cls(
            sums=torch.empty(2 * programs, cut.block_rows, head_dim, dtype=torch.float32, device=device),
            scales=torch.empty(2 * programs, 2, cut.block_rows, dtype=torch.float32, device=device),
            arrived=torch.zeros(programs, max(1, cut.num_warpgroups), dtype=torch.int32, device=device),
            cut=cut,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            has_pdl=has_pdl(),
        )


def _count_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _USUAL_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def count_words(capacity: int) -> int:
    """int32 words that describe up to `capacity` groups."""
    return HEADER + ARRAYS * capacity


def lay_groups(
    work: SharedWorkspace,
    page_size: int,
    first_rows: NDArray[np.int32],  # [n]
    num_rows: NDArray[np.int32],  # [n] at least 1: the rows of a group follow each other
    slots: NDArray[np.int32],  # [n] whose row of the block table holds the pages
    first_columns: NDArray[np.int32],  # [n]
    num_columns: NDArray[np.int32],  # [n] whole pages, at least 1
    capacity: int | None = None,  # n if not given
) -> NDArray[np.int32]:
    """[count_words(capacity)] int32 for `attend_shared`, to be uploaded as they are. No two groups share a row.

    Raises ValueError if there are more than `capacity` groups.
    """
    count, cut = first_rows.size, work.cut
    capacity = max(1, count) if capacity is None else capacity
    if count > capacity:
        raise ValueError(f"first_rows: {count} groups, but capacity={capacity}")
    words = np.zeros(count_words(capacity), np.int32)
    words[3:6] = capacity, work.num_kv_heads, work.num_heads // work.num_kv_heads
    if count:
        blocks = -(-num_columns.astype(np.int64) * page_size // cut.block_tokens)
        tiles = -(-num_rows.astype(np.int64) * (work.num_heads // work.num_kv_heads) // cut.block_rows)
        units = blocks + cut.tile_cost
        unit_ends = np.cumsum(units * tiles * work.num_kv_heads)
        words[:3] = count, unit_ends[-1], _choose_share(int(unit_ends[-1]), units, work.num_programs)
        arrays = words[HEADER:].reshape(ARRAYS, capacity)
        for array, values in zip(
            arrays, (first_rows, num_rows, slots, first_columns, num_columns, unit_ends), strict=True
        ):
            array[:count] = values
    return words


def _choose_share(total: int, units: NDArray[np.int64], num_programs: int) -> int:
    """Units of each program, but for the last. `units`: of a tile, by group.

    An equal share of all, but not so small that merging a tile's parts, one after the other, takes longer than it saves
    (by an estimate: half a unit's time for each); and a little more than equal, if then tiles end where programs do.
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
