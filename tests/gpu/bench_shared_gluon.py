"""Times a warp-specialised candidate of attention over shared tokens, in Gluon, beside model/kernels/shared_attention.

The kernel is shared_gluon's. The work is cut as `attend_shared` cuts it, for one group of whole blocks; tiles that
programs share leave parts, which are merged here by torch, outside of what is timed.

Prints microseconds a layer and the FLOPs of both products per second, of CUDA graphs of 16 layers with a cache each,
and the greatest differences from what `attend_shared` gives. Each candidate has a process of its own, with a limit.

Usage: python -m tests.gpu.bench_shared_gluon [NAME ...]
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from toka_engine.model.kernels.shared_attention import attend_shared
from toka_engine.model.kernels.shared_groups import SharedWorkspace, _choose_share, lay_groups
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tests.gpu.bench_products import compile_together, time_graph
from tests.gpu.bench_shared_attention import DEVICE, HEADS, KV_HEADS, LAYERS, PAGE_SIZE, Inputs
from tests.gpu.shared_gluon import specialised_kernel

BOX = 64
"""Values of a row that a TMA copy brings: 128 bytes, as wide as the swizzle."""
LOG2_E = 1.4426950408889634
SIZES = {64: [(1024, 4096), (4096, 4096), (1024, 16384)], 128: [(1024, 4096)]}
"""By head_dim: rows, tokens that all share."""
TODAY = "attend_shared"
LIMIT_S = 15
START_LIMIT_S = 60


@dataclass(frozen=True, slots=True)
class Candidate:
    """How one kernel cuts the work."""

    num_groups: int  # warpgroups that multiply
    rows: int  # of a tile, to a warpgroup; 64 or 128
    block: int  # keys to a block
    registers: int  # of a thread of a warpgroup that multiplies
    overlaps: bool  # the next block's scores are begun before this one's values are summed
    keeps_q: bool  # in registers, else in shared memory
    stages: int = 4  # blocks of keys, and of values, that are on their way or worked on

    @property
    def tile(self) -> int:
        return self.num_groups * self.rows


CANDIDATES = {
    64: {
        "3x64": Candidate(3, 64, 64, 160, overlaps=False, keeps_q=False),
        "3x64-overlap": Candidate(3, 64, 64, 160, overlaps=True, keeps_q=False),
        "3x64-overlap-q": Candidate(3, 64, 64, 160, overlaps=True, keeps_q=True),
        "2x128": Candidate(2, 128, 64, 240, overlaps=False, keeps_q=False),
        "4x64": Candidate(4, 64, 64, 112, overlaps=False, keeps_q=False),
        "3x64-wide": Candidate(3, 64, 128, 160, overlaps=False, keeps_q=False),
        "2x128-overlap": Candidate(2, 128, 64, 240, overlaps=True, keeps_q=False),
        "3x64-wide-q": Candidate(3, 64, 128, 160, overlaps=False, keeps_q=True),
    },
    128: {
        "3x64": Candidate(3, 64, 64, 160, overlaps=False, keeps_q=False),
        "3x64-overlap": Candidate(3, 64, 64, 160, overlaps=True, keeps_q=False),
        "2x64-overlap": Candidate(2, 64, 64, 240, overlaps=True, keeps_q=False),
        "2x64-wide-overlap": Candidate(2, 64, 128, 240, overlaps=True, keeps_q=False, stages=3),
    },
}


SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


class Work:
    """What the layers of a candidate's launch share: one group of `rows` and the pages in `table` [pages]."""

    def __init__(
        self, candidate: Candidate, rows: int, table: torch.Tensor, head_dim: int, device: torch.device
    ) -> None:
        self.candidate, self.table, self.rows = candidate, table, rows
        self.num_programs = (
            torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
        )
        self.num_blocks = table.numel() * PAGE_SIZE // candidate.block
        self.num_tiles = -(-rows * (HEADS // KV_HEADS) // candidate.tile)
        self.num_units = self.num_blocks * self.num_tiles * KV_HEADS
        self.share = _choose_share(self.num_units, np.array([self.num_blocks]), self.num_programs)
        self.sums = torch.empty(2 * self.num_programs, candidate.tile, head_dim, device=device)
        self.scales = torch.empty(2 * self.num_programs, 2, candidate.tile, device=device)

    def launch(
        self, q: torch.Tensor, keys: TensorDescriptor, values: TensorDescriptor, out: torch.Tensor, lse: torch.Tensor
    ) -> None:
        head_dim, candidate = q.shape[2], self.candidate
        specialised_kernel[(self.num_programs,)](
            q, keys, values, self.table, out, lse, self.sums, self.scales,
            head_dim**-0.5 * LOG2_E, self.num_blocks, self.num_tiles, self.rows, self.share, self.num_units,
            HEAD_DIM=head_dim, HEADS=HEADS, KV_HEADS=KV_HEADS, PAGE_SIZE=PAGE_SIZE, GROUPS=candidate.num_groups,
            ROWS=candidate.rows, BLOCK=candidate.block, REGISTERS=candidate.registers, STAGES=candidate.stages, BOX=BOX,
            OVERLAPS=candidate.overlaps, KEEPS_Q=candidate.keeps_q, num_warps=4,
        )  # fmt: skip

    def merge(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Write the tiles that programs share, from their parts."""
        per_kv = HEADS // KV_HEADS
        for tile in range(self.num_tiles * KV_HEADS):
            begin = tile * self.num_blocks
            first, last = begin // self.share, (begin + self.num_blocks - 1) // self.share
            if first == last:
                continue
            parts = [2 * first + 1, *(2 * program for program in range(first + 1, last + 1))]
            tops, totals = self.scales[parts].unbind(1)
            top = tops.amax(0)
            weights = torch.exp2(tops - top)
            total = (totals * weights).sum(0)
            sums = (self.sums[parts] * weights[:, :, None]).sum(0) / total[:, None]
            pair = tile % self.num_tiles * self.candidate.tile + torch.arange(self.candidate.tile, device=out.device)
            row, head = pair // per_kv, tile // self.num_tiles * per_kv + pair % per_kv
            there = row < self.rows
            out[row[there], head[there]] = sums[there].to(out.dtype)
            lse[row[there], head[there]] = (top + total.log2())[there]


def describe(tokens: torch.Tensor) -> TensorDescriptor:
    """Of one layer's keys or values [pages, KV_HEADS, PAGE_SIZE, head_dim]: a page of a head is rows that follow."""
    flat = tokens.view(-1, tokens.shape[3])
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [PAGE_SIZE, BOX], SWIZZLED)


class Bench:
    """One size, for one candidate or for what the engine has today."""

    def __init__(self, head_dim: int, rows: int, shared: int) -> None:
        torch.manual_seed(1)
        self.head_dim = head_dim
        num_pages = shared // PAGE_SIZE
        self.inputs = Inputs.random((rows, shared, 1), head_dim, num_pages)
        self.cache = torch.empty(
            LAYERS, 2, num_pages, KV_HEADS, PAGE_SIZE, head_dim, device=DEVICE, dtype=torch.bfloat16
        ).normal_()
        self.descriptors = [(describe(keys), describe(values)) for keys, values in self.cache]
        self.today = SharedWorkspace.allocate(HEADS, KV_HEADS, head_dim, DEVICE)
        number = np.zeros(1, np.int32)
        words = lay_groups(self.today, PAGE_SIZE, number, number + rows, number, number, number + num_pages)
        self.words = torch.from_numpy(words).to(DEVICE)

    def run_today(self, layer: int, out: torch.Tensor, lse: torch.Tensor) -> None:
        keys, values = self.cache[layer].transpose(2, 3)
        attend_shared(
            self.inputs.q, self.words, self.inputs.table, keys, values, out, lse, self.today, self.head_dim**-0.5
        )

    def make_work(self, candidate: Candidate) -> Work:
        return Work(candidate, self.inputs.size[0], self.inputs.table[0], self.head_dim, DEVICE)

    def run(self, work: Work, layer: int, out: torch.Tensor, lse: torch.Tensor) -> None:
        work.launch(self.inputs.q, *self.descriptors[layer], out, lse)

    def check(self, work: Work) -> str:
        """The greatest differences from today's result of the first layer, and whether another run gives others."""
        results = []
        for _ in range(2):
            out, lse = self.inputs.out.clone(), self.inputs.lse.clone()
            self.run(work, 0, out, lse)
            work.merge(out, lse)
            results.append((out, lse))
        expected, expected_lse = self.inputs.out.clone(), self.inputs.lse.clone()
        self.run_today(0, expected, expected_lse)
        (out, lse), (again, _) = results
        differs, lse_differs = (out.float() - expected.float()).abs().max(), (lse - expected_lse).abs().max()
        words = (
            f"out differs by {float(differs):.5f} of {float(expected.abs().max()):.3f}, lse by {float(lse_differs):.5f}"
        )
        return words if torch.equal(out, again) else f"{words}, OTHER BITS WHEN RUN AGAIN"

    def time(self, run: Any) -> str:
        out, lse = self.inputs.out.clone(), self.inputs.lse.clone()
        seconds = time_graph(lambda: [run(layer, out, lse) for layer in range(LAYERS)]) / LAYERS
        rows, shared, _ = self.inputs.size
        return (
            f"D {self.head_dim:3d} {rows:5d} x {shared:5d} {seconds * 1e6:8.2f} us a layer "
            f"{self.inputs.num_flops / seconds / 1e12:5.0f} TFLOP/s"
        )


@torch.inference_mode()
def run_alone(head_dim: int, name: str) -> None:
    """In a process of its own: compile, say so, wait for a word, and run."""
    small = Bench(head_dim, 64, 1024)
    candidate = CANDIDATES[head_dim].get(name)
    out, lse = small.inputs.out, small.inputs.lse

    def launch() -> None:
        small.run_today(0, out, lse)
        if candidate is not None:
            small.run(small.make_work(candidate), 0, out, lse)

    compile_together(launch)
    print("ready", flush=True)
    sys.stdin.readline()
    for rows, shared in SIZES[head_dim]:
        bench = Bench(head_dim, rows, shared)
        if candidate is None:
            print(f"{bench.time(bench.run_today)}  {name}", flush=True)
        else:
            work = bench.make_work(candidate)
            verdict = bench.check(work)
            print(f"{bench.time(partial(bench.run, work))}  {name}  {verdict}", flush=True)


def await_ready(child: subprocess.Popen[str], name: str) -> bool:
    """Until a process has compiled; else say what it said."""
    assert child.stdout is not None
    timer = threading.Timer(START_LIMIT_S, child.kill)
    timer.start()
    said = []
    for line in child.stdout:
        if line == "ready\n":
            timer.cancel()
            return True
        said.append(line)
    timer.cancel()
    print(f"{name}: FAILED, or not compiled within {START_LIMIT_S} s: {''.join(said)[-2000:]}", flush=True)
    return False


def finish(child: subprocess.Popen[str], name: str) -> None:
    """Let a process that is ready run, and end it if it takes too long."""
    began_s = time.monotonic()
    try:
        found, _ = child.communicate("go\n", timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        found = f"{child.communicate()[0]}{name}: HANGS, or takes more than {LIMIT_S} s\n"
    print(f"{found[-3000:]}{name}: {time.monotonic() - began_s:.1f} s, code {child.returncode}", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--alone"]:
        run_alone(int(sys.argv[2]), sys.argv[3])
        return
    asked = sys.argv[1:]
    children = []
    for head_dim, candidates in CANDIDATES.items():
        for name in [TODAY, *(each for each in candidates if not asked or each in asked)]:
            command = [sys.executable, "-m", "tests.gpu.bench_shared_gluon", "--alone", str(head_dim), name]
            pipe = subprocess.PIPE
            child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True)
            children.append((child, f"D {head_dim} {name}"))
    # None runs before all have compiled, so that nothing else is on the GPU or keeps the host busy.
    for child, name in [each for each in children if await_ready(*each)]:
        finish(child, name)


if __name__ == "__main__":
    main()
