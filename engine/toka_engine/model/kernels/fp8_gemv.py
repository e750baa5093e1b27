"""GEMV of weights of 8-bit floats for a step of one row, by tensor cores: one kernel each, fused as those of `gemv`.

A CUDA core takes some ten instructions for four weights, to convert, multiply and add them, and as many for the row,
so a program that reads only one output at a time is bound by them and not by memory. Here a warp multiplies 16 outputs
at once by mma.m16n8k16, and all its registers but a few hold weights that are on their way. A weight takes 1.2
instructions, most of them conversions to float16, in which e4m3 is exact.

The order of the inputs within a product is free. So each thread loads 16 neighbouring weights of an output, which is
how four mma have their operand, and nothing is exchanged. The row, which is the other operand, is the same for all
tiles of a program; it lies in shared memory in float16, each piece that one warp multiplies in a chunk with a power
of 2 that fits its largest value: neither overflows, and of bfloat16 nothing is lost.

Sums are fp32, and a result is rounded once, after norm, scale, activation and add. An 8B layer without attention takes
60 us on an H200, 68 with products by CUDA cores (tests/gpu/bench_fp8.py). What lost: prefetching the next kernel's
weights into L2 (65 for 16 MB), loading again as soon as a pair's registers are free and not a chunk's (62), one factor
for a warp's part of the whole row (61), other numbers of warps and programs (64 and more).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from toka_engine.model.kernels import DEPENDENT_LAUNCH_CAPABILITY, cdiv, count_processors, next_power_of_2
from toka_engine.model.kernels.gemv import FusedGemv

_WARPS = gl.constexpr(8)
_LOADS = gl.constexpr(4)
"""Loads of 16 weights that a thread has on their way, for each of two outputs and each of two chunks."""
_CHUNK = 8 * 4 * 64
"""Weights of an output that a program multiplies between two loads: 64 a load and warp, next to each other."""
_PROGRAMS_PER_PROCESSOR = 2
_OPERAND = gl.constexpr(gl.BlockedLayout([1, 1, 1], [1, 8, 4], [8, 1, 1], [2, 1, 0]))
"""[warp, output, lane]: what each thread of a warp has of an operand of mma, or of its sums."""
_WORDS = gl.constexpr(gl.BlockedLayout([1, 1, 1, 4], [1, 8, 4, 1], [8, 1, 1, 1], [3, 2, 1, 0]))
_ROW_WORDS = gl.constexpr(gl.BlockedLayout([1, 1, 1, 8], [1, 8, 4, 1], [8, 1, 1, 1], [3, 2, 1, 0]))
_VALUES = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0]))
"""[warp, value]: a chunk of the row."""


@gluon.jit
def _multiply(first, second, low, high, sums):
    """Add the products of a word of weights of two outputs, 8 apart, and the words of the row: one mma of each warp.

    All are [WARPS, 8, 4], sums four of them; a word has 4 weights in e4m3 or 2 values of the row in float16.
    """
    return gl.inline_asm_elementwise(
        """
        {
        .reg .b16 begin, end;
        .reg .b32 a, b, c, d;
        mov.b32 {begin, end}, $4;
        cvt.rn.f16x2.e4m3x2 a, begin;
        cvt.rn.f16x2.e4m3x2 c, end;
        mov.b32 {begin, end}, $5;
        cvt.rn.f16x2.e4m3x2 b, begin;
        cvt.rn.f16x2.e4m3x2 d, end;
        mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, {a, b, c, d}, {$6, $7}, {$8, $9, $10, $11};
        }
        """,
        "=f,=f,=f,=f,r,r,r,r,f,f,f,f",
        [first, second, low, high, sums[0], sums[1], sums[2], sums[3]],
        dtype=(gl.float32, gl.float32, gl.float32, gl.float32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _load_weights(weight_ptr, tile, chunk, num_out, num_words, IS_GATED: gl.constexpr):
    """Load a chunk of a tile's 16 outputs; with IS_GATED these are 8 of gate and the same 8 of up.

    Outputs and words that the weight does not have are others of it: the row is 0 there, or nothing is stored.
    """
    warp = gl.arange(0, _WARPS, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, _WORDS))))[:, None, None, None]
    row = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, _WORDS))))[None, :, None, None]
    lane = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, _WORDS))))[None, None, :, None]
    each = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, _WORDS))))[None, None, None, :]
    if IS_GATED:
        out = gl.minimum(tile * 8 + row, num_out - 1)
        out_2 = out + num_out
    else:
        out = gl.minimum(tile * 16 + row, num_out - 1)
        out_2 = gl.minimum(tile * 16 + 8 + row, num_out - 1)
    begin = weight_ptr + out.to(gl.int64) * num_words
    begin_2 = weight_ptr + out_2.to(gl.int64) * num_words
    weights = ()
    for load in gl.static_range(_LOADS):
        word = ((chunk * _WARPS + warp) * _LOADS + load) * 16 + lane * 4
        word = gl.multiple_of(gl.minimum(word, num_words - 4), [1, 1, 1, 4]) + each
        weights += (  # type: ignore[assignment]
            gl.load(begin + word, eviction_policy="evict_first"),
            gl.load(begin_2 + word, eviction_policy="evict_first"),
        )
    return weights


@gluon.jit
def _split_words(words):
    """[WARPS, 8, 4, 4] -> four times [WARPS, 8, 4]."""
    even, odd = gl.split(gl.reshape(words, [_WARPS, 8, 4, 2, 2]))
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return (
        gl.convert_layout(first, _OPERAND, assert_trivial=True),
        gl.convert_layout(second, _OPERAND, assert_trivial=True),
        gl.convert_layout(third, _OPERAND, assert_trivial=True),
        gl.convert_layout(fourth, _OPERAND, assert_trivial=True),
    )


@gluon.jit
def _make_zeros():
    zeros = gl.zeros([_WARPS, 8, 4], gl.float32, _OPERAND)
    return zeros, zeros, zeros, zeros


@gluon.jit
def _add_chunk(sums, weights, row, factors, chunk):
    """Add a chunk's products to the sums of a tile's first 8 outputs and of its last, [WARPS, 8, 4] each.

    Each column of a product is the same: the sum over lanes is 8 times the one that is meant.
    """
    piece = row.index(chunk)
    products = _make_zeros()
    for load in gl.static_range(_LOADS):
        first = _split_words(weights[2 * load])
        second = _split_words(weights[2 * load + 1])
        words, _ = gl.broadcast(
            piece.slice(load, 1, dim=1).load(_ROW_WORDS), gl.zeros([_WARPS, 8, 4, 8], gl.int32, _ROW_WORDS)
        )
        low, high = gl.split(gl.reshape(words, [_WARPS, 8, 4, 4, 2]))
        low, high = _split_words(low), _split_words(high)
        for each in gl.static_range(4):
            products = _multiply(first[each], second[each], low[each], high[each], products)
    factor = factors.index(chunk).load(gl.SliceLayout(1, gl.SliceLayout(2, _OPERAND)))[:, None, None]
    return sums[0] + factor * (products[0] + products[1]), sums[1] + factor * (products[2] + products[3])


@gluon.jit
def _take_row(x_ptr, norm_ptr, row, factors, width, eps, HAS_NORM: gl.constexpr, HAS_PDL: gl.constexpr):
    """Store the row, times the norm's weights, and each warp's factor of each chunk; return 1 / rms, or 1.

    All loads are on their way before the first value is used.
    """
    CHUNKS: gl.constexpr = row.shape[0]
    warp = gl.arange(0, _WARPS, gl.SliceLayout(1, _VALUES))[:, None]
    place = warp * (64 * _LOADS) + gl.arange(0, 64 * _LOADS, gl.SliceLayout(0, _VALUES))[None, :]
    norms = ()
    if HAS_NORM:
        for chunk in gl.static_range(CHUNKS):
            at = chunk * (_WARPS * 64 * _LOADS) + place
            norms += (gl.load(norm_ptr + at, mask=at < width, other=0.0),)  # type: ignore[assignment]
    if HAS_PDL:
        gdc_wait()  # what kernels before this one wrote is read below alone, and nothing is written above
    values = ()
    for chunk in gl.static_range(CHUNKS):
        at = chunk * (_WARPS * 64 * _LOADS) + place
        values += (gl.load(x_ptr + at, mask=at < width, other=0.0),)  # type: ignore[assignment]
    squares = gl.zeros([_WARPS, 64 * _LOADS], gl.float32, _VALUES)
    for chunk in gl.static_range(CHUNKS):
        x = values[chunk].to(gl.float32)  # type: ignore[var-annotated]
        if HAS_NORM:
            squares += x * x
            x *= norms[chunk].to(gl.float32)
        # 2 ** (exponent - 126) is greater than all values: by the factor they become less than 2 ** 14, float16's end
        # being 2 ** 16. Infinities and NaN stay such.
        exponent = gl.maximum(gl.max(gl.abs(x), axis=1).to(gl.int32, bitcast=True) >> 23, 14)
        factor = ((267 - exponent) << 23).to(gl.float32, bitcast=True)
        halves = gl.reshape((x * factor[:, None]).to(gl.float16), [_WARPS, _LOADS, 4, 8, 2])
        low, high = gl.split(halves.to(gl.int16, bitcast=True))
        row.index(chunk).store((low.to(gl.int32) & 0xFFFF) | (high.to(gl.int32) << 16))
        factors.index(chunk).store(((exponent - 13) << 23).to(gl.float32, bitcast=True))
    rms = 1.0
    if HAS_NORM:
        rms = 1.0 / gl.sqrt(gl.sum(gl.sum(squares, axis=1), axis=0) / width + eps)
    return rms


@gluon.jit
def _finish(
    sums, rms, tile, scale_ptr, bias_ptr, out_ptr, num_out,
    IS_GATED: gl.constexpr, ADDS: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Store a tile's 16 outputs; with IS_GATED 8 of gate and up."""
    of_both = gl.sum(gl.sum(gl.join(sums[0], sums[1]), axis=2), axis=0)  # [8, 2]
    result, result_2 = gl.split(of_both * (rms * 0.125))
    out = tile * (8 if IS_GATED else 16) + gl.arange(0, 8, result.type.layout)
    out_2 = out + (num_out if IS_GATED else 8)
    is_out = out < num_out
    is_out_2 = is_out if IS_GATED else out_2 < num_out
    result *= gl.load(scale_ptr + out, mask=is_out, other=0.0)
    result_2 *= gl.load(scale_ptr + out_2, mask=is_out_2, other=0.0)
    if HAS_BIAS:
        result += gl.load(bias_ptr + out, mask=is_out, other=0.0).to(gl.float32)
        result_2 += gl.load(bias_ptr + out_2, mask=is_out_2, other=0.0).to(gl.float32)
    if IS_GATED:
        result = result / (1.0 + gl.exp(-result)) * result_2
    if ADDS:
        result += gl.load(out_ptr + out, mask=is_out, other=0.0).to(gl.float32)
        result_2 += gl.load(out_ptr + out_2, mask=is_out_2, other=0.0).to(gl.float32)
    gl.store(out_ptr + out, result.to(out_ptr.dtype.element_ty), mask=is_out)
    if not IS_GATED:
        gl.store(out_ptr + out_2, result_2.to(out_ptr.dtype.element_ty), mask=is_out_2)


@gluon.jit
def _advance(tile, chunk, num_chunks):
    """Return the tile and chunk that a program multiplies next."""
    is_last = chunk + 1 == num_chunks
    return gl.where(is_last, tile + gl.num_programs(0), tile), gl.where(is_last, 0, chunk + 1)


@gluon.jit(do_not_specialize=["num_out", "num_tiles"])
def _fp8_gemv_kernel(
    x_ptr,  # [width]
    norm_ptr,  # [width], with HAS_NORM
    weight_ptr,  # words of four e4m3 [num_out, width / 4], with IS_GATED [2 * num_out, width / 4]: gate, then up
    bias_ptr,  # as many as the weight has rows, with HAS_BIAS
    scale_ptr,  # float32, as many as the weight has rows
    out_ptr,  # [num_out]
    num_out,
    num_tiles,
    width,
    eps,
    CHUNKS: gl.constexpr,  # a power of 2, as many as the width has, or more
    HAS_NORM: gl.constexpr,
    IS_GATED: gl.constexpr,
    ADDS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_PDL: gl.constexpr,
):
    if HAS_PDL:
        gdc_launch_dependents()
    WORDS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    row = gl.allocate_shared_memory(gl.int32, [CHUNKS, _WARPS, _LOADS, 4, 8], WORDS)
    factors = gl.allocate_shared_memory(gl.float32, [CHUNKS, _WARPS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    num_words = width // 4
    num_chunks = (width + _WARPS * 64 * _LOADS - 1) // (_WARPS * 64 * _LOADS)
    tile, chunk = gl.program_id(0), 0
    # Weights are loaded two chunks ahead, the first two before what earlier kernels write is waited for: no step writes
    # weights.
    weights = _load_weights(weight_ptr, tile, chunk, num_out, num_words, IS_GATED)
    next_tile, next_chunk = _advance(tile, chunk, num_chunks)
    weights_2 = _load_weights(weight_ptr, next_tile, next_chunk, num_out, num_words, IS_GATED)
    rms = _take_row(x_ptr, norm_ptr, row, factors, width, eps, HAS_NORM, HAS_PDL)
    zeros = _make_zeros()
    sums = (zeros[0], zeros[1])
    # A turn has both chunks that are on their way: one that moved to other registers would have to have arrived first.
    while tile < num_tiles:
        sums = _add_chunk(sums, weights, row, factors, chunk)
        next_tile, next_chunk = _advance(next_tile, next_chunk, num_chunks)
        if next_tile < num_tiles:
            weights = _load_weights(weight_ptr, next_tile, next_chunk, num_out, num_words, IS_GATED)
        if chunk + 1 == num_chunks:
            _finish(sums, rms, tile, scale_ptr, bias_ptr, out_ptr, num_out, IS_GATED, ADDS, HAS_BIAS)
            sums = (zeros[0], zeros[1])
        tile, chunk = _advance(tile, chunk, num_chunks)
        sums = _add_chunk(sums, weights_2, row, factors, chunk)
        next_tile, next_chunk = _advance(next_tile, next_chunk, num_chunks)
        if next_tile < num_tiles:
            weights_2 = _load_weights(weight_ptr, next_tile, next_chunk, num_out, num_words, IS_GATED)
        if chunk + 1 == num_chunks:  # behind the last tile, too: nothing of it is stored
            _finish(sums, rms, tile, scale_ptr, bias_ptr, out_ptr, num_out, IS_GATED, ADDS, HAS_BIAS)
            sums = (zeros[0], zeros[1])
        tile, chunk = _advance(tile, chunk, num_chunks)


@dataclass(frozen=True, slots=True)
class Fp8Gemv(FusedGemv):
    """An ops.GemvKernels, for the weights [out, in] float8_e4m3fn of one linear layer; `in` is a multiple of 16."""

    scale: torch.Tensor  # [out] float32
    has_pdl: bool
    max_programs: int
    """Tiles are dealt out to so many programs; as many as run at once are best."""

    @classmethod
    def for_capability(cls, capability: int, scale: torch.Tensor) -> Fp8Gemv:
        """`capability` of the device, as 90: FP8_CAPABILITY or more."""
        max_programs = _PROGRAMS_PER_PROCESSOR * count_processors(scale.device)
        return cls(scale, capability >= DEPENDENT_LAUNCH_CAPABILITY, max_programs)

    def launch(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        *,
        norm: torch.Tensor | None = None,
        eps: float = 0.0,
        is_gated: bool = False,
        adds: bool = False,
        is_behind_norm: bool = True,
    ) -> torch.Tensor:
        """See FusedGemv."""
        num_out, width = out.shape[1], weight.shape[1]
        num_tiles = cdiv(num_out, 8 if is_gated else 16)
        _fp8_gemv_kernel[(min(num_tiles, self.max_programs),)](
            x, x if norm is None else norm, weight.view(torch.int32), x if bias is None else bias, self.scale, out,
            num_out, num_tiles, width, eps, CHUNKS=next_power_of_2(cdiv(width, _CHUNK)),
            HAS_NORM=norm is not None, IS_GATED=is_gated, ADDS=adds, HAS_BIAS=bias is not None, HAS_PDL=self.has_pdl,
            num_warps=8, launch_pdl=self.has_pdl,
        )  # fmt: skip
        return out
