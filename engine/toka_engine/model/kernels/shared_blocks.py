"""What a warpgroup of `shared_hopper` does with blocks of keys and values that another warp has brought.

`ring`: keys and values [stages, block, head_dim] in shared memory, and of each stage the barriers that tell that it is
full and that it is empty again; and the barriers of turns. `count` numbers the blocks of a program, whatever tiles they
are of. TURN is the warpgroup's number, or -1 where none takes turns.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def wait_for(full, count):
    STAGES: gl.constexpr = full.shape[0]
    mbarrier.wait(full.index(count % STAGES), (count // STAGES) & 1)


@gluon.jit
def release(empty, count):
    STAGES: gl.constexpr = empty.shape[0]
    mbarrier.arrive(empty.index(count % STAGES), count=1)


@gluon.jit
def _take_turn(turns, count, TURN: gl.constexpr):
    """Wait until the warpgroup before this one has begun its products of the block; the first one, until the last one
    has of the block before."""
    if TURN >= 0:
        mbarrier.wait(turns.index(TURN), (count & 1) ^ (1 if TURN == 0 else 0))


@gluon.jit
def _pass_turn(turns, TURN: gl.constexpr):
    if TURN >= 0:
        mbarrier.arrive(turns.index((TURN + 1) % 3), count=1)


@gluon.jit
def _begin_scores(q, keys, k_full, count, SCORES: gl.constexpr):
    """Begin a block's products with the queries, once its keys are there."""
    ROWS: gl.constexpr = q.shape[0]
    STAGES: gl.constexpr = keys.shape[0]
    BLOCK: gl.constexpr = keys.shape[1]
    wait_for(k_full, count)
    zeros = gl.zeros([ROWS, BLOCK], gl.float32, SCORES)
    return warpgroup_mma(q, keys.index(count % STAGES).permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _find_scores(q, ring, count, TURN: gl.constexpr, SCORES: gl.constexpr):
    """A block's products with the queries, of which no other of this warpgroup are under way."""
    keys, _, k_full, k_empty, _, _, turns = ring
    _take_turn(turns, count, TURN)
    begun = _begin_scores(q, keys, k_full, count, SCORES)
    _pass_turn(turns, TURN)
    scores = warpgroup_mma_wait(0, [begun])
    release(k_empty, count)
    return scores


@gluon.jit
def _begin_sums(weights, values, count, sums):
    """Begin to add a block's values, which are there."""
    STAGES: gl.constexpr = values.shape[0]
    return warpgroup_mma(weights, values.index(count % STAGES), sums, is_async=True)


@gluon.jit
def _add_values(weights, ring, count, sums):
    """The sums with a block's values, once these are there."""
    _, values, _, _, v_full, v_empty, _ = ring
    wait_for(v_full, count)
    sums = warpgroup_mma_wait(0, [_begin_sums(weights, values, count, sums)])
    release(v_empty, count)
    return sums


@gluon.jit
def _weigh(scores, scale, top, total, WEIGHTS: gl.constexpr, DTYPE: gl.constexpr):
    """The new greatest score and sum of weights, by how much what was summed before shrinks, and the weights."""
    new_top = gl.maximum(top, gl.max(scores, axis=1) * scale)
    kept = gl.exp2(top - new_top)
    weights = gl.exp2(scores * scale - new_top[:, None])
    total = total * kept + gl.sum(weights, axis=1)
    return new_top, total, kept, gl.convert_layout(weights.to(DTYPE), WEIGHTS)


@gluon.jit
def shrink(sums, kept, SUMS: gl.constexpr):
    return sums * gl.convert_layout(kept, gl.SliceLayout(1, SUMS))[:, None]


@gluon.jit
def _attend_block(
    q, ring, count, num_tokens, scale, top, total, sums,
    TURN: gl.constexpr, SCORES: gl.constexpr, SUMS: gl.constexpr, WEIGHTS: gl.constexpr, IS_SHORT: gl.constexpr,
):  # fmt: skip
    """The greatest score, sum of weights and weighted sums with one block more; if it is short, of `num_tokens`."""
    BLOCK: gl.constexpr = ring[0].shape[1]
    DTYPE: gl.constexpr = ring[0].dtype
    scores = _find_scores(q, ring, count, TURN, SCORES)
    if IS_SHORT:
        token = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, SCORES))
        scores = gl.where((token < num_tokens)[None, :], scores, float("-inf"))
    top, total, kept, weights = _weigh(scores, scale, top, total, WEIGHTS, DTYPE)
    return top, total, _add_values(weights, ring, count, shrink(sums, kept, SUMS))


@gluon.jit
def _attend_joined(
    q, ring, count, num_blocks, scale, top, total, sums,
    TURN: gl.constexpr, SCORES: gl.constexpr, SUMS: gl.constexpr, WEIGHTS: gl.constexpr,
):  # fmt: skip
    """The same with `num_blocks` > 0 full blocks, a block's values summed and the next one's scores made together."""
    keys, values, k_full, k_empty, v_full, v_empty, turns = ring
    DTYPE: gl.constexpr = keys.dtype
    scores = _find_scores(q, ring, count, TURN, SCORES)
    top, total, kept, weights = _weigh(scores, scale, top, total, WEIGHTS, DTYPE)
    sums = shrink(sums, kept, SUMS)
    for each in range(count + 1, count + num_blocks):
        wait_for(v_full, each - 1)
        _take_turn(turns, each, TURN)
        added = _begin_sums(weights, values, each - 1, sums)
        begun = _begin_scores(q, keys, k_full, each, SCORES)
        _pass_turn(turns, TURN)
        sums, scores, weights = warpgroup_mma_wait(0, [added, begun, weights])
        release(v_empty, each - 1)
        release(k_empty, each)
        top, total, kept, weights = _weigh(scores, scale, top, total, WEIGHTS, DTYPE)
        sums = shrink(sums, kept, SUMS)
    return top, total, _add_values(weights, ring, count + num_blocks - 1, sums)


@gluon.jit
def _attend_overlapped(
    q, ring, count, num_blocks, scale, top, total, sums,
    TURN: gl.constexpr, SCORES: gl.constexpr, SUMS: gl.constexpr, WEIGHTS: gl.constexpr,
):  # fmt: skip
    """The same, a block's scores begun before the values of the one before are summed, which goes on meanwhile."""
    keys, values, k_full, k_empty, v_full, v_empty, turns = ring
    DTYPE: gl.constexpr = keys.dtype
    scores = _find_scores(q, ring, count, TURN, SCORES)
    top, total, kept, weights = _weigh(scores, scale, top, total, WEIGHTS, DTYPE)
    sums = shrink(sums, kept, SUMS)
    wait_for(v_full, count)
    for each in range(count + 1, count + num_blocks):
        _take_turn(turns, each, TURN)
        begun = _begin_scores(q, keys, k_full, each, SCORES)
        added = _begin_sums(weights, values, each - 1, sums)
        _pass_turn(turns, TURN)
        scores = warpgroup_mma_wait(1, [begun])
        release(k_empty, each)
        top, total, kept, next_weights = _weigh(scores, scale, top, total, WEIGHTS, DTYPE)
        # The next weights are made before the sums are waited for: without a branch (of the wait for values)
        # between them, and without being named in the second wait, they would be made behind it.
        wait_for(v_full, each)
        sums, weights, next_weights = warpgroup_mma_wait(0, [added, weights, next_weights])
        release(v_empty, each - 1)
        sums = shrink(sums, kept, SUMS)
        weights = next_weights
    return top, total, _add_values(weights, ring, count + num_blocks - 1, sums)


@gluon.jit
def attend(
    q, ring, count, begin_block, end_block, num_tokens, scale, top, total, sums,
    TURN: gl.constexpr, SCORES: gl.constexpr, SUMS: gl.constexpr, PRODUCTS: gl.constexpr,
):  # fmt: skip
    """The greatest score, sum of weights and weighted sums with blocks begin_block..end_block-1 of `num_tokens` too.

    PRODUCTS: see SharedCut. Only the last block may be short, and is worked on apart: the others take no masks.
    """
    BLOCK: gl.constexpr = ring[0].shape[1]
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    num_full = gl.minimum(end_block, num_tokens // BLOCK) - begin_block
    if PRODUCTS == "apart":
        for each in range(count, count + num_full):
            top, total, sums = _attend_block(
                q, ring, each, BLOCK, scale, top, total, sums, TURN, SCORES, SUMS, WEIGHTS, False
            )
    elif num_full > 0:
        if PRODUCTS == "joined":
            top, total, sums = _attend_joined(
                q, ring, count, num_full, scale, top, total, sums, TURN, SCORES, SUMS, WEIGHTS
            )
        else:
            gl.static_assert(PRODUCTS == "overlapped")
            top, total, sums = _attend_overlapped(
                q, ring, count, num_full, scale, top, total, sums, TURN, SCORES, SUMS, WEIGHTS
            )
    if begin_block + num_full < end_block:
        top, total, sums = _attend_block(
            q, ring, count + num_full, num_tokens % BLOCK, scale, top, total, sums, TURN, SCORES, SUMS, WEIGHTS, True
        )
    return top, total, sums


@gluon.jit
def let_pass(ring, count, num_blocks, TURN: gl.constexpr):
    """Of a tile in which this warpgroup has no rows: say of each block, once it is there, that it is not needed."""
    _, _, k_full, k_empty, v_full, v_empty, turns = ring
    for each in range(count, count + num_blocks):
        _take_turn(turns, each, TURN)
        _pass_turn(turns, TURN)
        wait_for(k_full, each)
        release(k_empty, each)
        wait_for(v_full, each)
        release(v_empty, each)
