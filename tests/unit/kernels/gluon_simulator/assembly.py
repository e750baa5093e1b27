"""PTX that kernels write inline: each text must be one that is known here, by its main instruction.

Threads are the places of a block in the layout [warp, group, lane of four], as an mma of a warp has them.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.unit.kernels.gluon_simulator.values import Value, join_layouts, to_torch_type

_MMA = """{
.reg .b16 begin, end;
.reg .b32 a, b, c, d;
mov.b32 {begin, end}, $4;
cvt.rn.f16x2.e4m3x2 a, begin;
cvt.rn.f16x2.e4m3x2 c, end;
mov.b32 {begin, end}, $5;
cvt.rn.f16x2.e4m3x2 b, begin;
cvt.rn.f16x2.e4m3x2 d, end;
mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, {a, b, c, d}, {$6, $7}, {$8, $9, $10, $11};
}""".splitlines()


def inline_asm_elementwise(asm: str, constraints: str, args: Any, dtype: Any, is_pure: bool, pack: int) -> Any:
    lines = [line.strip() for line in asm.strip().splitlines()]
    layout = join_layouts(*args)
    types = [to_torch_type(each) for each in dtype]
    operands = constraints, *types, *(each.data.dtype for each in args), pack
    if lines == _MMA:
        words, sums = (torch.int32,) * 4, (torch.float32,) * 4
        _check(operands, "=f,=f,=f,=f,r,r,r,r,f,f,f,f", *sums, *words, *sums, 1)
        return tuple(Value(each, layout) for each in _multiply(*(each.data for each in args)))
    raise NotImplementedError(f"this assembly is not simulated: {asm}")


def _check(operands: tuple[Any, ...], *expected: Any) -> None:
    if operands != expected:
        raise TypeError(f"operands {operands} where {expected} are needed")


def _multiply(
    first: torch.Tensor, second: torch.Tensor, low: torch.Tensor, high: torch.Tensor, *sums: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Words [warps, 8, 4] of four e4m3 of rows `group` and `group + 8`, of two float16 of column `group`: where an mma
    of 16 x 16 by 16 x 8 has its operands (PTX ISA, matrix fragments for mma.m16n8k16).
    """
    warps = first.shape[0]
    if first.shape != (warps, 8, 4):
        raise TypeError(f"a block of shape {list(first.shape)} is no operand of an mma")
    rows = [each.contiguous().view(torch.float8_e4m3fn).float().view(warps, 8, 4, 2, 2) for each in (first, second)]
    left = torch.cat(rows, dim=1).transpose(2, 3).reshape(warps, 16, 16)  # depth: half, lane, which of two
    columns = [each.contiguous().view(torch.float16).float().view(warps, 8, 4, 2) for each in (low, high)]
    right = torch.stack(columns, dim=2).reshape(warps, 8, 16).transpose(1, 2)
    found = (left @ right).view(warps, 2, 8, 4, 2)
    added = (found[:, 0, ..., 0], found[:, 0, ..., 1], found[:, 1, ..., 0], found[:, 1, ..., 1])
    return tuple(each + more for each, more in zip(sums, added, strict=True))
