"""Ranks that exchange a sum chunk by chunk, simulated on one device, have the sums and norms of the other kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.marks import rest_is_slow
from tests.unit.kernels.test_all_reduce import make_parts_whose_order_matters, make_ranks, reduce_on_all
from tests.unit.kernels.test_layer_kernels import reference_norm, relative_error

BF16 = torch.bfloat16
WIDTH, MAX_ROWS = 96, 8
CHUNKS = (slice(0, 3), slice(3, 5), slice(5, 8))


class SimulatedRanks:
    """The boxes of all ranks in one tensor, and the copies that ranks make into them."""

    def __init__(self, device: torch.device, num_ranks: int) -> None:
        from toka_engine.model.kernels.chunk_sum import NUM_TURNS, Boxes

        size = Boxes.size_bytes(MAX_ROWS, WIDTH, num_ranks)
        self.regions = torch.full((num_ranks, size // 4), -1, dtype=torch.int32, device=device)
        addresses = tuple(region.data_ptr() for region in self.regions)
        self.boxes = [
            Boxes(
                rank, num_ranks, MAX_ROWS, WIDTH, addresses,
                self.regions[rank][: Boxes.count_words(MAX_ROWS, WIDTH, num_ranks)].view(
                    NUM_TURNS, num_ranks - 1, MAX_ROWS, WIDTH // 2
                ),
            )
            for rank in range(num_ranks)
        ]  # fmt: skip

    def put(self, part: torch.Tensor, source: int, turn: int, first_row: int) -> None:
        for owner, boxes in enumerate(self.boxes):
            if owner != source:
                at = (boxes.find_box(owner, source, turn, first_row) - boxes.addresses[owner]) // 4
                self.regions[owner][at : at + part.numel() // 2] = part.contiguous().view(torch.int32).flatten()


@pytest.mark.parametrize("num_ranks", rest_is_slow([2], [2, 3]))
def test_chunks_have_the_bits_of_the_all_reduce_of_all_rows(device, generator, num_ranks) -> None:
    from toka_engine.model.kernels.chunk_sum import sum_add_rms_norm

    simulated, ranks = SimulatedRanks(device, num_ranks), make_ranks(device, num_ranks)
    weight = torch.randn(WIDTH, generator=generator, device=device).to(BF16)
    for turn in (1, 2, 3):
        partials = torch.randn(num_ranks, MAX_ROWS, WIDTH, generator=generator, device=device).to(BF16)
        partials[:, 2, 5] = -0.0  # which the other kernel sends as 0.0
        start = torch.randn(MAX_ROWS, WIDTH, generator=generator, device=device).to(BF16)
        residuals = [start.clone() for _ in ranks]
        outs = reduce_on_all(ranks, partials, residuals, weight, 1e-5, list(range(num_ranks)))
        for source in range(num_ranks):
            for chunk in CHUNKS:
                simulated.put(partials[source, chunk], source, turn, chunk.start)
        for rank in range(num_ranks):
            residual, out = start.clone(), torch.full_like(start, float("nan"))
            for chunk in CHUNKS:
                sum_add_rms_norm(
                    partials[rank, chunk], residual[chunk], weight, 1e-5, simulated.boxes[rank], turn, chunk.start,
                    out[chunk],
                )  # fmt: skip
            assert torch.equal(residual, residuals[rank])
            assert relative_error(out, outs[rank]) < 1e-2
            assert relative_error(out, reference_norm(residual, weight, 1e-5)) < 1e-2


def test_parts_are_added_in_the_order_of_ranks_on_every_rank(device, generator) -> None:
    from toka_engine.model.kernels.chunk_sum import sum_add_rms_norm

    num_ranks, rows = 3, 2
    simulated = SimulatedRanks(device, num_ranks)
    weight = torch.ones(WIDTH, device=device).to(BF16)
    parts, expected = make_parts_whose_order_matters(num_ranks, rows, generator)
    for source in range(num_ranks):
        simulated.put(parts[source], source, 1, 0)
    for rank in range(num_ranks):
        residual = torch.zeros(rows, WIDTH, device=device).to(BF16)
        sum_add_rms_norm(parts[rank], residual, weight, 1e-5, simulated.boxes[rank], 1, 0, torch.empty_like(residual))
        assert torch.equal(residual, expected)


def test_no_two_rows_that_are_under_way_share_memory_with_each_other_or_with_a_flag() -> None:
    from toka_engine.model.kernels.chunk_sum import MAX_CHUNKS, Boxes

    num_ranks, begin = 3, 4096
    boxes = Boxes(0, num_ranks, MAX_ROWS, WIDTH, (begin,) * num_ranks, torch.empty(0))
    size = Boxes.size_bytes(MAX_ROWS, WIDTH, num_ranks)
    for owner in range(num_ranks):
        peers = [rank for rank in range(num_ranks) if rank != owner]
        places: list[tuple[int, int]] = [
            (boxes.find_box(owner, source, turn, row), 2 * WIDTH)
            for source in peers
            for turn in (6, 7)
            for row in range(MAX_ROWS)
        ]
        places += [(boxes.find_flag(owner, source, chunk), 4) for source in peers for chunk in range(MAX_CHUNKS)]
        places.sort()
        ends = [at + length for at, length in places]
        assert all(end <= at for end, (at, _) in zip(ends, places[1:], strict=False))
        assert places[0][0] >= begin
        assert ends[-1] <= begin + size


def test_boxes_without_rows_take_no_memory_and_rows_that_they_are_not_for_are_an_error(device) -> None:
    from toka_engine.model.kernels.chunk_sum import Boxes, sum_add_rms_norm

    assert Boxes.size_bytes(0, WIDTH, 2) == 0
    rows: Any = torch.zeros(4, WIDTH, dtype=BF16, device=device)
    boxes = SimulatedRanks(device, 2).boxes[0]
    for part, first_row in ((rows, 5), (rows[:, :64].contiguous(), 0), (rows.float(), 0)):
        with pytest.raises(AssertionError, match="are not what the boxes are for"):
            sum_add_rms_norm(part, part, part[0], 1e-5, boxes, 1, first_row, part)
