"""A kernel that is right gives what it should however its tasks are ordered, and each fault in it ends the launch.

The kernel here is a small one of the kind: a warp brings blocks, two warpgroups multiply rows of their own by them.
"""

from __future__ import annotations

import threading

import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tests.unit.kernels import gluon_simulator
from tests.unit.kernels.gluon_simulator import Deadlock, OutOfBounds, Race, TookTooLong

ROWS, BLOCK, PAGE, DEPTH, STAGES = 64, 32, 16, 64, 2
SEEDS = range(10)


@gluon.jit
def _bring(desc, keys, full, empty, num_blocks, PAGE_SIZE: gl.constexpr, FAULT: gl.constexpr):
    STAGES: gl.constexpr = keys.shape[0]
    NUM_BYTES: gl.constexpr = keys.shape[1] * keys.shape[2] * 2
    for block in range(num_blocks):
        stage = block % STAGES
        if FAULT != "copies before it is empty":
            mbarrier.wait(empty.index(stage), ((block // STAGES) & 1) ^ 1)
        if FAULT == "expects too few bytes":
            mbarrier.expect(full.index(stage), NUM_BYTES // 2)
        else:
            mbarrier.expect(full.index(stage), NUM_BYTES * 2 if FAULT == "expects too many bytes" else NUM_BYTES)
        for page in gl.static_range(keys.shape[1] // PAGE_SIZE):
            place = keys.index(stage).slice(page * PAGE_SIZE, PAGE_SIZE, 0)
            tma.async_copy_global_to_shared(
                desc, [block * keys.shape[1] + page * PAGE_SIZE, 0], full.index(stage), place
            )


@gluon.jit
def _release(empty, WHICH: gl.constexpr, FAULT: gl.constexpr):
    if not (FAULT == "never arrives" and WHICH == 1):
        mbarrier.arrive(empty, count=2 if FAULT == "arrives twice" else 1)


@gluon.jit
def _multiply(rows_ptr, out_ptr, rows, keys, full, empty, num_blocks, WHICH: gl.constexpr, FAULT: gl.constexpr):
    """Sums of the products with all blocks: [ROWS, BLOCK]."""
    ROWS: gl.constexpr = rows.shape[0]
    DEPTH: gl.constexpr = rows.shape[1]
    STAGES: gl.constexpr = keys.shape[0]
    BLOCK: gl.constexpr = keys.shape[1]
    READ: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    row = WHICH * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, READ))
    at = row[:, None] * DEPTH + gl.arange(0, DEPTH, layout=gl.SliceLayout(0, READ))[None, :]
    rows.store(gl.load(rows_ptr + at))
    if FAULT != "multiplies without a fence":
        fence_async_shared()
    sums = gl.zeros([ROWS, BLOCK], gl.float32, SUMS)
    for block in range(num_blocks - 1 if FAULT == "leaves a block" else num_blocks):
        stage = block % STAGES
        phase = (block // STAGES) & 1
        if FAULT != "multiplies before it is full":
            mbarrier.wait(full.index(stage), phase ^ 1 if FAULT == "waits for the wrong phase" else phase)
        added = warpgroup_mma(rows, keys.index(stage).permute((1, 0)), sums, is_async=True)
        if FAULT == "releases before the product ends":
            _release(empty.index(stage), WHICH, FAULT)
        sums = added if FAULT == "takes a product that has not ended" else warpgroup_mma_wait(0, [added])
        if FAULT != "releases before the product ends":
            _release(empty.index(stage), WHICH, FAULT)
    column = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, READ if FAULT == "mixes layouts" else SUMS))
    row = WHICH * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUMS))
    if FAULT == "writes too far":
        row += 1
    gl.store(out_ptr + row[:, None] * BLOCK + column[None, :], sums)


@gluon.jit
def _kernel(
    rows_ptr, desc, out_ptr, num_blocks,
    ROWS: gl.constexpr, BLOCK: gl.constexpr, DEPTH: gl.constexpr, PAGE_SIZE: gl.constexpr, STAGES: gl.constexpr,
    FAULT: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    keys = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK, DEPTH], LAYOUT)
    rows = gl.allocate_shared_memory(gl.bfloat16, [2, ROWS, DEPTH], LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        if FAULT != "does not initialise":
            mbarrier.init(empty.index(stage), count=1 if FAULT == "counts too few arrivals" else 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (rows_ptr, out_ptr, rows.index(0), keys, full, empty, num_blocks, 0, FAULT)),
            (_multiply, (rows_ptr, out_ptr, rows.index(1), keys, full, empty, num_blocks, 1, FAULT)),
            (_bring, (desc, keys, full, empty, num_blocks, PAGE_SIZE, FAULT)),
        ],
        [4, 1],
        [160, 24],
    )


def run(
    monkeypatch: pytest.MonkeyPatch, seed: int, fault: str = "", num_blocks: int = 7
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's result, and the right one."""
    monkeypatch.setenv(gluon_simulator.SEED, str(seed))
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(2 * ROWS, DEPTH, generator=generator).bfloat16()
    keys = torch.randn(num_blocks * BLOCK, DEPTH, generator=generator).bfloat16()
    out = torch.empty(2 * ROWS, BLOCK)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    desc = TensorDescriptor(keys, list(keys.shape), list(keys.stride()), [PAGE, DEPTH], layout)
    gluon_simulator.launch(
        _kernel, (1,), rows, desc, out, num_blocks,
        ROWS=ROWS, BLOCK=BLOCK, DEPTH=DEPTH, PAGE_SIZE=PAGE, STAGES=STAGES, FAULT=fault,
    )  # fmt: skip
    return out, (rows.float() @ keys.float().T).view(2 * ROWS, num_blocks, BLOCK).sum(1)


@pytest.mark.parametrize("num_blocks", [1, 2, 7])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_kernel_that_is_right_gives_the_sums_in_any_order(monkeypatch, seed, num_blocks) -> None:
    torch.testing.assert_close(*run(monkeypatch, seed, num_blocks=num_blocks), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("copies before it is empty", (Race, RuntimeError), "may come before the end of|more arrivals"),
        ("multiplies before it is full", Race, "may come before the end of|nothing has written"),
        ("waits for the wrong phase", (Race, Deadlock), "may come before the end|nothing has written|waits for"),
        ("releases before the product ends", Race, "a copy in .* may come before the end of a product in"),
        ("multiplies without a fence", Race, "a product in .* comes without a fence behind a store in"),
        ("counts too few arrivals", (Race, Deadlock), ""),
        ("arrives twice", (Race, Deadlock, RuntimeError), ""),
        ("never arrives", Deadlock, "waits for phase 0 of barrier . of those made in .*lacks 1 of 2 arrivals"),
        ("expects too few bytes", (Race, RuntimeError), "a phase ends while 1 copies|may come before the end of"),
        ("expects too many bytes", Deadlock, "waits for phase 0 of barrier . .*lacks 0 of 1 arrivals and 4096 bytes"),
        ("leaves a block", Race, "the program may end before a copy that began in"),
        ("takes a product that has not ended", (Race, TypeError), "may come before the end of|was not waited for"),
        ("mixes layouts", TypeError, "layouts differ"),
        ("writes too far", OutOfBounds, "32 places outside of 4096 elements"),
        ("does not initialise", RuntimeError, "was not initialised"),
    ],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_fault_ends_the_launch_whatever_the_order(monkeypatch, seed, fault, error, words) -> None:
    threads = set(threading.enumerate())  # another test's file may have left some
    with pytest.raises(error, match=words or None) as caught:
        run(monkeypatch, seed, fault)
    assert any(f"{gluon_simulator.SEED}={seed}" in note for note in caught.value.__notes__)
    assert set(threading.enumerate()) <= threads


def test_a_seed_gives_the_same_order_again(monkeypatch) -> None:
    words = set()
    for _ in range(3):
        with pytest.raises(Deadlock) as caught:
            run(monkeypatch, 5, "never arrives")
        words.add(str(caught.value))
    assert len(words) == 1


@gluon.jit
def _add_up(
    in_ptr, parts_ptr, arrived_ptr, out_ptr, SIZE: gl.constexpr, HAS_BARRIER: gl.constexpr, IS_EARLY: gl.constexpr
):
    """Each program leaves its part; the last one that arrives adds up all."""
    place = gl.arange(0, SIZE, layout=gl.BlockedLayout([1], [32], [4], [0]))
    part = parts_ptr + gl.program_id(0) * SIZE + place
    if not IS_EARLY:
        gl.store(part, gl.load(in_ptr + gl.program_id(0) * SIZE + place))
    if HAS_BARRIER:
        gl.thread_barrier()
    arrived = gl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu")
    gl.thread_barrier()
    if IS_EARLY:
        gl.store(part, gl.load(in_ptr + gl.program_id(0) * SIZE + place))
    if arrived == gl.num_programs(0) - 1:
        total = gl.zeros([SIZE], gl.float32, gl.BlockedLayout([1], [32], [4], [0]))
        for program in range(gl.num_programs(0)):
            total += gl.load(parts_ptr + program * SIZE + place)
        gl.store(out_ptr + place, total, mask=place < SIZE - 1)
        gl.store(arrived_ptr, 0)


def add_up(monkeypatch: pytest.MonkeyPatch, seed: int, **options: bool) -> tuple[torch.Tensor, torch.Tensor]:
    monkeypatch.setenv(gluon_simulator.SEED, str(seed))
    parts = torch.randint(0, 9, (5, 128)).float()
    arrived, out = torch.zeros(1, dtype=torch.int32), torch.zeros(128)
    gluon_simulator.launch(_add_up, (5,), parts, torch.empty(5, 128), arrived, out, SIZE=128, **options)
    assert int(arrived) == 0
    expected = parts.sum(0)
    expected[-1] = 0
    return out, expected


@pytest.mark.parametrize("seed", SEEDS)
def test_the_last_program_that_arrives_finds_what_others_left(monkeypatch, seed) -> None:
    assert torch.equal(*add_up(monkeypatch, seed, HAS_BARRIER=True, IS_EARLY=False))


@pytest.mark.parametrize(("has_barrier", "is_early"), [(False, False), (True, True)])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_program_that_arrives_before_its_stores_are_sure_ends_the_launch(
    monkeypatch, seed, has_barrier, is_early
) -> None:
    with pytest.raises(Race, match=r"a load in .* may come before the end of a store in"):
        add_up(monkeypatch, seed, HAS_BARRIER=has_barrier, IS_EARLY=is_early)


@gluon.jit
def _run_on(flag_ptr, WAITS: gl.constexpr):
    while gl.load(flag_ptr, volatile=WAITS) == 0:
        pass


@pytest.mark.parametrize("waits", [False, True])
def test_a_launch_that_goes_on_for_ever_ends_at_its_limit(monkeypatch, waits) -> None:
    threads = set(threading.enumerate())
    monkeypatch.setattr(gluon_simulator, "LIMIT_S", 0.2)
    with pytest.raises(TookTooLong):
        gluon_simulator.launch(_run_on, (2,), torch.zeros(1, dtype=torch.int32), WAITS=waits)
    assert set(threading.enumerate()) <= threads


@gluon.jit
def _compute(in_ptr, out_ptr, number):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    values = gl.load(in_ptr + gl.arange(0, 128, layout=LAYOUT))
    scale = gl.load(in_ptr).to(gl.float32) / 3
    half = (values * scale).to(gl.bfloat16)
    gl.store(out_ptr + gl.arange(0, 128, layout=LAYOUT), half)
    gl.store(out_ptr + 128, (number - 10) // 4)
    gl.store(out_ptr + 129, (number - 10) % 4)
    gl.store(out_ptr + 130, number * 1000000000)


def test_numbers_have_the_types_and_signs_of_the_kernel_language() -> None:
    values = torch.randn(128).bfloat16()
    out = torch.zeros(131)
    gluon_simulator.launch(_compute, (1,), values, out, 3)
    assert torch.equal(out[:128], (values.float() * (values[0].float() / 3)).bfloat16().float())
    assert out[128:].tolist() == [-1.0, -3.0, -1294967296.0]  # as in C: towards 0, and in 32 bits


@gluon.jit
def _copy(desc, out_ptr, row, column, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    block = gl.allocate_shared_memory(gl.float32, [ROWS, COLUMNS], desc.layout)
    mbarrier.expect(ready, ROWS * COLUMNS * 4)
    tma.async_copy_global_to_shared(desc, [row, column], ready, block)
    mbarrier.wait(ready, 0)
    at = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))[:, None] * COLUMNS
    gl.store(out_ptr + at + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))[None, :], block.load(LAYOUT))


@pytest.mark.parametrize(("row", "column"), [(0, 0), (4, 8), (6, 10), (-3, -5), (40, 0)])
def test_a_copy_gives_zeros_outside_of_the_tensor(row, column) -> None:
    whole = torch.randn(10, 16)
    out = torch.full((8, 8), 7.0)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=32, rank=2)
    desc = TensorDescriptor(whole[:, :12], [10, 12], [16, 1], [8, 8], layout)
    gluon_simulator.launch(_copy, (1,), desc, out, row, column, ROWS=8, COLUMNS=8)
    padded = torch.zeros(100, 100)
    padded[30:40, 30:42] = whole[:, :12]
    assert torch.equal(out, padded[30 + row : 38 + row, 30 + column : 38 + column])
