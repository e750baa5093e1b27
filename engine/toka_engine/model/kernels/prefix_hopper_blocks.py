"""Consumer side of `prefix_hopper`: a warpgroup's online softmax over blocks that the producer warp has loaded.

`ring` holds keys and values [stages, block, head_dim] in shared memory, and for each stage three barriers: keys are
loaded, values are loaded, the stage is empty. `count` numbers the blocks of a program across tiles. The state of the
softmax is top, total [ROWS] and sums [ROWS, HEAD_DIM], fp32, in base 2.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def _wait_for(full, count):
    """Wait until block `count` is loaded."""
    STAGES: gl.constexpr = full.shape[0]
    mbarrier.wait(full.index(count % STAGES), (count // STAGES) & 1)


@gluon.jit
def _release(empty, count):
    """Report that this warpgroup no longer needs block `count`."""
    STAGES: gl.constexpr = empty.shape[0]
    mbarrier.arrive(empty.index(count % STAGES), count=1)


@gluon.jit
def _find_scores(q, ring, count, SCORES: gl.constexpr):
    """Return q @ keys^T of a block [ROWS, BLOCK] fp32, once its keys are loaded."""
    keys, _, k_full, _, _ = ring
    ROWS: gl.constexpr = q.shape[0]
    STAGES: gl.constexpr = keys.shape[0]
    BLOCK: gl.constexpr = keys.shape[1]
    _wait_for(k_full, count)
    zeros = gl.zeros([ROWS, BLOCK], gl.float32, SCORES)
    begun = warpgroup_mma(q, keys.index(count % STAGES).permute((1, 0)), zeros, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, [begun])


@gluon.jit
def _add_values(weights, ring, count, sums):
    """Return sums + weights @ values of a block, once these are loaded, and release the block."""
    _, values, _, v_full, empty = ring
    STAGES: gl.constexpr = values.shape[0]
    _wait_for(v_full, count)
    sums = warpgroup_mma_wait(0, [warpgroup_mma(weights, values.index(count % STAGES), sums, is_async=True)])
    _release(empty, count)
    return sums


@gluon.jit
def _weigh(scores, scale, top, total, WEIGHTS: gl.constexpr, DTYPE: gl.constexpr):
    """Return the new maximum and sum of weights, the factor for earlier sums, and the weights [ROWS, BLOCK]."""
    new_top = gl.maximum(top, gl.max(scores, axis=1) * scale)
    kept = gl.exp2(top - new_top)
    weights = gl.exp2(scores * scale - new_top[:, None])
    total = total * kept + gl.sum(weights, axis=1)
    return new_top, total, kept, gl.convert_layout(weights.to(DTYPE), WEIGHTS)


@gluon.jit
def shrink(sums, kept, SUMS: gl.constexpr):
    """Return sums [ROWS, HEAD_DIM] times kept [ROWS]."""
    return sums * gl.convert_layout(kept, gl.SliceLayout(1, SUMS))[:, None]


@gluon.jit
def _attend_block(
    q, ring, count, num_tokens, scale, top, total, sums,
    SCORES: gl.constexpr, SUMS: gl.constexpr, WEIGHTS: gl.constexpr, IS_SHORT: gl.constexpr,
):  # fmt: skip
    """Advance the online softmax by one block; if it is short, by its first `num_tokens` tokens."""
    BLOCK: gl.constexpr = ring[0].shape[1]
    scores = _find_scores(q, ring, count, SCORES)
    if IS_SHORT:
        token = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, SCORES))
        scores = gl.where((token < num_tokens)[None, :], scores, float("-inf"))
    top, total, kept, weights = _weigh(scores, scale, top, total, WEIGHTS, ring[0].dtype)
    return top, total, _add_values(weights, ring, count, shrink(sums, kept, SUMS))


@gluon.jit
def attend(
    q, ring, count, begin_block, end_block, num_tokens, scale, top, total, sums,
    SCORES: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """Advance the online softmax by blocks begin_block..end_block-1 of `num_tokens` tokens.

    Only the last block may be short, and is handled separately: the others take no masks.
    """
    BLOCK: gl.constexpr = ring[0].shape[1]
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    num_full = gl.minimum(end_block, num_tokens // BLOCK) - begin_block
    for each in range(count, count + num_full):
        top, total, sums = _attend_block(q, ring, each, BLOCK, scale, top, total, sums, SCORES, SUMS, WEIGHTS, False)
    if begin_block + num_full < end_block:
        top, total, sums = _attend_block(
            q, ring, count + num_full, num_tokens % BLOCK, scale, top, total, sums, SCORES, SUMS, WEIGHTS, True
        )
    return top, total, sums


@gluon.jit
def let_pass(ring, count, num_blocks):
    """Release the blocks of a tile in which this warpgroup has no rows, once each is loaded."""
    for each in range(count, count + num_blocks):
        _wait_for(ring[2], each)
        _wait_for(ring[3], each)
        _release(ring[4], each)
