"""Times all-reduce + residual add + RMSNorm of several GPUs, in CUDA graphs, beside NCCL with the norm of one GPU.

Usage: python3 -m tests.gpu.bench_all_reduce [WIDTH]. Checks first that all ranks hold the same bits, near those of
float64. One line a number of rows: microseconds for each way, and the share of the link's bandwidth.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from toka_engine.model.cuda.peer_memory import PeerMemory
from toka_engine.model.kernels.all_reduce import (
    EMPTY_WORD,
    Inboxes,
    all_reduce_add_rms_norm,
    count_resident_programs,
)
from toka_engine.model.kernels.norm import add_rms_norm

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
BF16 = torch.bfloat16


def time_in_graph(call: Callable[[], object], num_calls: int = 20) -> float:
    """Microseconds a call, captured `num_calls` times in one graph; the median of seven timings of five replays."""
    call()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(num_calls):
            call()
    times = []
    for _ in range(8):
        torch.cuda.synchronize()
        dist.barrier()
        graph.replay()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(5):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / (5 * num_calls) * 1e3)
    dist.barrier()
    return sorted(times[1:])[3]


def check(inboxes: Inboxes, rank: int) -> None:
    """Three turns of different sizes: the same bits on all ranks, and near the sum in float64."""
    generator = torch.Generator("cuda").manual_seed(7)
    weight = torch.randn(inboxes.width, generator=generator, device="cuda").to(BF16)
    for rows in (1, 700, 64, 3, 2048):
        partials = torch.randn(inboxes.num_ranks, rows, inboxes.width, generator=generator, device="cuda").to(BF16)
        residual = torch.randn(rows, inboxes.width, generator=generator, device="cuda").to(BF16)
        total = residual.double() + partials.double().sum(0)
        out = all_reduce_add_rms_norm(partials[rank].contiguous(), residual, weight, 1e-5, inboxes)
        torch.cuda.synchronize()
        error = float((residual.double() - total).norm() / total.norm())
        wide = residual.double()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()
        norm_error = float((out.double() - normed).norm() / normed.norm())
        sums = [torch.empty_like(residual) for _ in range(inboxes.num_ranks)]
        dist.all_gather(sums, residual)
        same = all(torch.equal(sums[0], other) for other in sums)
        if rank == 0:
            print(f"check rows {rows}: error {error:.1e}, norm {norm_error:.1e}, same bits {same}", flush=True)
        assert error < 4e-3
        assert norm_error < 8e-3
        assert same


def bench(rank: int, num_ranks: int, path: str, width: int) -> None:
    torch.cuda.set_device(rank)
    store = dist.FileStore(path, num_ranks)
    store.set_timeout(timedelta(seconds=60))
    dist.init_process_group("nccl", store=store, rank=rank, world_size=num_ranks, device_id=torch.device("cuda", rank))

    def gather(data: bytes) -> list[bytes]:
        every: list[bytes] = [b""] * num_ranks
        dist.all_gather_object(every, data)
        return every

    max_rows = max(ROWS)
    size = Inboxes.size_bytes(max_rows, width, num_ranks)
    with PeerMemory(rank, num_ranks, size, gather) as memory:
        memory.verify()
        memory.view(torch.int32).fill_(EMPTY_WORD)
        torch.cuda.synchronize()
        dist.barrier()
        turns = torch.zeros(max_rows, dtype=torch.int32, device="cuda")
        programs = count_resident_programs(torch.device("cuda", rank))
        inboxes = Inboxes(rank, num_ranks, max_rows, width, memory.addresses, turns, programs)
        check(inboxes, rank)
        weight = torch.ones(width, dtype=BF16, device="cuda")
        for rows in ROWS:
            partial = torch.randn(rows, width, device="cuda").to(BF16)
            residual = torch.zeros(rows, width, dtype=BF16, device="cuda")
            out = torch.empty_like(partial)

            def with_nccl(partial=partial, residual=residual, out=out) -> None:
                dist.all_reduce(partial)
                add_rms_norm(partial, residual, weight, 1e-5, out)

            norm = time_in_graph(lambda a=partial, r=residual, o=out: add_rms_norm(a, r, weight, 1e-5, o))
            nccl = time_in_graph(with_nccl)
            ours = time_in_graph(
                lambda a=partial, r=residual, o=out: all_reduce_add_rms_norm(a, r, weight, 1e-5, inboxes, o)
            )
            rate = rows * width * 2 * (num_ranks - 1) / ours / 1e3
            if rank == 0:
                print(
                    f"rows {rows:5d}: norm {norm:.1f}, nccl+norm {nccl:.1f}, ours {ours:.1f} ({rate:.0f} GB/s)",
                    flush=True,
                )
        torch.cuda.synchronize()
        dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    width = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
    num_ranks = torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(bench, (num_ranks, os.path.join(folder, "store"), width), nprocs=num_ranks)


if __name__ == "__main__":
    main()
