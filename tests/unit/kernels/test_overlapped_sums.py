"""Ranks that exchange a sum while a GEMM runs: whatever copies are late, every rank has the sum of all, and no box is
written before it is read.

The ranks are simulated on one device. Their copies wait in a queue and are done in a random order among ranks, at the
latest when somebody waits for them.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.marks import rest_is_slow
from tests.unit.kernels.test_layer_kernels import relative_error

BF16 = torch.bfloat16
WIDTH, MAX_ROWS = 32, 300
THRESHOLD = 3


class Regions:
    """The memory of all ranks, found by address."""

    def __init__(self, num_ranks: int, num_words: int, device: torch.device) -> None:
        self.words = torch.zeros(num_ranks, num_words, dtype=torch.int32, device=device)

    def find(self, address: int, num_words: int) -> torch.Tensor:
        at = (address - self.words.data_ptr()) // 4
        return self.words.view(-1)[at : at + num_words]


class LateQueue:
    """A CopyQueue whose copies are done at any time, in its order."""

    def __init__(self, chance: random.Random, every: list[LateQueue], regions: Regions) -> None:
        self._chance, self._every, self._regions, self._turn = chance, every, regions, 0
        self.pending: deque[Callable[[], Any]] = deque()
        self.is_captured = False
        every.append(self)

    def is_usable(self) -> bool:
        return not self.is_captured

    def set_turn(self, turn: int) -> None:
        self._turn = turn

    def follow(self, index: int) -> None:
        """The current stream has done all it was given."""

    def copy(self, address: int, rows: torch.Tensor) -> None:
        words = rows.view(torch.int32).flatten()
        self.pending.append(lambda: self._regions.find(address, words.numel()).copy_(words))

    def put_turn(self, address: int) -> None:
        turn = self._turn - (self._turn >> 31 << 32)  # the word as int32
        self.pending.append(lambda: self._regions.find(address, 1).fill_(turn))

    def mark(self) -> LateQueue:
        return self

    def wait(self, address: int | None = None, turn: int = 0) -> None:
        """Let copies of all be done until the flag at the address is there, or more; without one, the own copies."""
        if address is None:
            while self.pending:
                self.pending.popleft()()
            return
        num_early = self._chance.choice([0, 3, 50])
        while (is_late := (int(self._regions.find(address, 1)) - turn) & 0x80000000) or num_early > 0:
            waiting = [queue for queue in self._every if queue.pending]
            if not waiting:
                assert not is_late, "nobody sends what is waited for"
                return
            self._chance.choice(waiting).pending.popleft()()
            num_early -= 1


class Ranks:
    """All ranks of a model, in one process."""

    def __init__(self, num_ranks: int, chance: random.Random, device: torch.device) -> None:
        from toka_engine.model.cuda.overlapped_sums import OverlappedSums
        from toka_engine.model.kernels.chunk_sum import NUM_TURNS, Boxes

        count = Boxes.count_words(MAX_ROWS, WIDTH, num_ranks)
        size = Boxes.size_bytes(MAX_ROWS, WIDTH, num_ranks) // 4
        self.regions = Regions(num_ranks, size, device)
        words, shape = self.regions.words, (NUM_TURNS, num_ranks - 1, MAX_ROWS, -1)
        addresses = tuple(region.data_ptr() for region in words)
        self.queues: list[LateQueue] = []
        self.sums = [
            OverlappedSums(
                Boxes(rank, num_ranks, MAX_ROWS, WIDTH, addresses, words[rank][:count].view(shape)),
                THRESHOLD,
                LateQueue(chance, self.queues, self.regions),
            )
            for rank in range(num_ranks)
        ]


@pytest.mark.parametrize("num_ranks", rest_is_slow([2], [2, 3]))
def test_every_rank_has_the_sum_of_all_whichever_copies_are_late(
    num_ranks: int, device: torch.device, generator: torch.Generator
) -> None:
    """A rank that has a sum begins the next one although others still wait for the copies of this one. The memory of
    its parts is given away then.
    """
    chance = random.Random(5)
    ranks, weight = Ranks(num_ranks, chance, device), torch.ones(WIDTH, device=device).to(BF16)
    matrices = torch.randn(num_ranks, WIDTH, 16, generator=generator, device=device).to(BF16)
    sizes = (3, 300, 7, 260, 3)
    inputs = [torch.randn(num_ranks, rows, 16, generator=generator, device=device).to(BF16) for rows in sizes]
    residuals = [[torch.zeros(rows, WIDTH, device=device).to(BF16) for _ in range(num_ranks)] for rows in sizes]
    begun: list[list[Any]] = [[] for _ in range(num_ranks)]
    made: list[list[torch.Tensor]] = [[] for _ in range(num_ranks)]

    def begin(rank: int, turn: int) -> None:
        def multiply(x: torch.Tensor) -> torch.Tensor:
            made[rank].append(x @ matrices[rank].T)
            return made[rank][-1]

        begun[rank].append(ranks.sums[rank].begin(inputs[turn][rank], multiply))

    for rank in range(num_ranks):
        begin(rank, 0)
    for turn in range(len(sizes)):
        for rank in chance.sample(range(num_ranks), num_ranks):
            begun[rank][turn].add_rms_norm(residuals[turn][rank], weight, 1e-5)
            while made[rank]:
                made[rank].pop().fill_(float("nan"))
            if turn + 1 < len(sizes):
                begin(rank, turn + 1)
        parts = [(x @ matrix.T).double() for x, matrix in zip(inputs[turn], matrices, strict=True)]
        for residual in residuals[turn]:
            assert relative_error(residual, sum(parts)) < 1e-2
            assert torch.equal(residual, residuals[turn][0])


def test_few_rows_and_captured_ones_are_left_to_the_kernel(device: torch.device) -> None:
    ranks = Ranks(2, random.Random(1), device)
    x = torch.ones(THRESHOLD, 16, device=device).to(BF16)
    assert ranks.sums[0].begin(x[1:], lambda x: x) is None
    ranks.queues[0].is_captured = True
    assert ranks.sums[0].begin(x, lambda x: x) is None
    assert not ranks.queues[0].pending


def test_turns_go_on_behind_the_largest_word(device: torch.device, generator: torch.Generator) -> None:
    ranks, weight = Ranks(2, random.Random(2), device), torch.ones(WIDTH, device=device).to(BF16)
    ranks.regions.words[:] = -2  # the flags, and what boxes hold does not matter
    for sums in ranks.sums:
        sums._turn = 2**32 - 2
    for _ in range(3):
        rows = torch.randn(2, 4, WIDTH, generator=generator, device=device).to(BF16)
        begun = [sums.begin(x, lambda x: x) for sums, x in zip(ranks.sums, rows, strict=True)]
        for each in begun:
            residual = torch.zeros(4, WIDTH, device=device).to(BF16)
            assert each is not None
            each.add_rms_norm(residual, weight, 1e-5)
            assert relative_error(residual, rows.double().sum(0)) < 1e-2


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [(1, [1]), (256, [256]), (300, [256, 44]), (2047, [1024, 1023]), (4096, [1024] * 4), (8192, [2048] * 4)],
)
def test_rows_are_cut_into_chunks_of_whole_tiles(rows: int, sizes: list[int]) -> None:
    from toka_engine.model.cuda.overlapped_sums import cut_rows

    assert [chunk.stop - chunk.start for chunk in cut_rows(rows)] == sizes


def test_all_rows_are_in_one_chunk_and_there_are_no_more_chunks_than_flags() -> None:
    from toka_engine.model.cuda.overlapped_sums import cut_rows
    from toka_engine.model.kernels.chunk_sum import MAX_CHUNKS

    for rows in range(1, 20000, 37):
        chunks = cut_rows(rows)
        assert len(chunks) <= MAX_CHUNKS
        assert [row for chunk in chunks for row in (chunk.start, chunk.stop)][1:-1] == [
            edge for chunk in chunks[1:] for edge in (chunk.start, chunk.start)
        ]
        assert (chunks[0].start, chunks[-1].stop) == (0, rows)
