"""Ranks that exchange sums while GEMMs run have the bits of the parts' sums, and a model the logits of one GPU.

Each test starts two processes, which meet as the workers of an engine do. With one GPU they share it: CUDA IPC works
between processes on the same GPU, too, and its scheduler lets them take turns. NCCL refuses that, so the tests of it
are in test_tensor_parallel, which needs two.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from toka_engine.model.cuda.overlapped_sums import OverlappedSums, StreamQueue
from toka_engine.model.cuda.peer_links import LinkSizes, connect_peers
from toka_engine.model.cuda.rendezvous import Rendezvous
from toka_engine.model.sharding import Sharding

from tests.gpu.test_parity import make
from tests.gpu.test_tensor_parallel import NUM_RANKS, Seen, check_logits, drive, run_ranks

BF16 = torch.bfloat16
WIDTH, DEEP, MAX_ROWS = 1024, 2048, 4096
NUM_SUMS = 120
KEYS = {"async_tp_threshold": 64}


def connect(rank: int, meeting: str) -> OverlappedSums:
    """Make the sums of a rank. Sums of fewer than 64 rows are not for them."""
    torch.cuda.set_device(rank % torch.cuda.device_count())
    sizes = LinkSizes(WIDTH, MAX_ROWS, 8, 1024, MAX_ROWS)
    links = connect_peers(Sharding(rank, NUM_RANKS), sizes, 90, Rendezvous(Path(meeting), rank, NUM_RANKS).gather)
    assert links.boxes is not None
    return OverlappedSums(links.boxes, 64, StreamQueue())


def make_parts(seed: int, rank: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A rank's input [rows, DEEP] and matrix [WIDTH, DEEP] of a sum: every rank can make those of all."""
    generator = torch.Generator("cuda").manual_seed(1000 * seed + rank)
    x = torch.randn(rows, DEEP, generator=generator, device="cuda").to(BF16)
    return x, torch.randn(WIDTH, DEEP, generator=generator, device="cuda").to(BF16)


def multiply(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, matrix)


def sum_much(rank: int, meeting: str, out: str) -> None:
    """Many sums of different sizes in a row, whose memory is used again at once; no host waits in between."""
    guard = torch.inference_mode()
    with guard:
        sums, weight = connect(rank, meeting), torch.ones(WIDTH, device="cuda", dtype=BF16)
        sizes = np.random.default_rng(3).integers(64, MAX_ROWS, NUM_SUMS).tolist()
        wrong, checks = 0, []
        for seed, rows in enumerate(sizes):
            residual = torch.zeros(rows, WIDTH, device="cuda", dtype=BF16)
            x, matrix = make_parts(seed, rank, rows)
            begun = sums.begin(x, lambda x, matrix=matrix: multiply(x, matrix))
            assert begun is not None
            normed = begun.add_rms_norm(residual, weight, 1e-5)
            del x, matrix, begun
            checks.append((residual, normed))
            if len(checks) == 20:
                wrong += sum(not is_right(seed - 19 + n, *check) for n, check in enumerate(checks))
                checks.clear()
        torch.save(wrong, f"{out}/{rank}")


def is_right(seed: int, residual: torch.Tensor, normed: torch.Tensor) -> bool:
    """Whether these are the sum of all ranks' parts, in rank order in float32, and its norm."""
    from toka_engine.model.cuda.overlapped_sums import cut_rows

    total = torch.zeros(residual.shape, device="cuda")
    for rank in range(NUM_RANKS):
        x, matrix = make_parts(seed, rank, residual.shape[0])
        total += torch.cat([multiply(x[chunk], matrix) for chunk in cut_rows(x.shape[0])])
    wide = residual.double()
    wanted = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return torch.equal(residual, total.to(BF16)) and float((normed - wanted).norm() / wanted.norm()) < 5e-3


def test_many_sums_in_a_row_have_the_bits_of_their_parts_in_rank_order(tmp_path: Path) -> None:
    mp.spawn(sum_much, (f"{tmp_path}/meeting", str(tmp_path)), nprocs=NUM_RANKS)
    assert [torch.load(tmp_path / str(rank)) for rank in range(NUM_RANKS)] == [0, 0]


def lose_a_rank(rank: int, meeting: str, out: str) -> None:
    guard = torch.inference_mode()
    with guard:
        sums = connect(rank, meeting)
        (x, matrix), residual = make_parts(0, rank, 512), torch.zeros(512, WIDTH, device="cuda", dtype=BF16)
        for number in range(4):
            if rank == 1 and number == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            begun = sums.begin(x, lambda x: multiply(x, matrix))
            assert begun is not None
            begun.add_rms_norm(residual, matrix[:, 0].contiguous(), 1e-5)
            torch.cuda.synchronize()
            Path(out, f"{rank}_{number}").touch()


def test_a_rank_whose_peer_is_gone_waits_until_it_is_killed_and_then_ends(tmp_path: Path) -> None:
    """The supervisor sees the peer's end and kills the others: a stream that waits must not keep them."""
    context = mp.get_context("spawn")
    ranks = [context.Process(target=lose_a_rank, args=(rank, f"{tmp_path}/m", str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        ranks[1].join(60)
        assert ranks[1].exitcode == -signal.SIGKILL
        ranks[0].join(2)
        assert ranks[0].exitcode != 0  # it waits, or its driver has noticed
        assert (tmp_path / "0_1").exists()
        assert not (tmp_path / "0_2").exists()
        began = time.monotonic()
        ranks[0].kill()
        ranks[0].join(10)
        assert ranks[0].exitcode not in (0, None)
        print(f"ended {time.monotonic() - began:.1f} s after SIGKILL")
    finally:
        for process in ranks:
            process.kill()


@pytest.fixture(scope="module", params=["Llama", "Qwen3"])
def alone(request: pytest.FixtureRequest) -> Iterator[tuple[Path, Seen]]:
    """A model, and what one process makes of it."""
    with tempfile.TemporaryDirectory() as folder:
        make(request.param, Path(folder))
        yield Path(folder), drive(Path(folder), None, {})
    torch.cuda.empty_cache()


def test_a_model_whose_sums_are_overlapped_has_the_logits_of_one_gpu(alone: tuple[Path, Seen]) -> None:
    folder, single = alone
    first, second = run_ranks(folder, KEYS, single.forced)
    check_logits(first, single)
    when_ready, at_the_end = first.num_overlapped
    assert when_ready > 0, "the largest steps, by which memory is measured, exchange so as well"
    assert at_the_end > when_ready + 10
    assert first.num_overlapped == second.num_overlapped
    for ours, theirs in zip(first.tokens, second.tokens, strict=True):
        for column in ("ids", "logprobs", "top_rows", "top_tokens", "top_logprobs"):
            np.testing.assert_array_equal(getattr(ours, column), getattr(theirs, column))
    assert first.texts == second.texts
    assert first.noise == second.noise
    (plain, _), logits = run_ranks(folder, {}, single.forced), torch.cat(first.forced_logits)
    assert plain.num_overlapped == [0, 0]
    of_plain = torch.cat(plain.forced_logits)
    error = float((logits - of_plain).norm() / of_plain.norm())
    print(f"error against the other exchange {error:.5f}, equal bits {torch.equal(logits, of_plain)}")
    assert error < 2e-2  # GEMMs of chunks may add up in another order
