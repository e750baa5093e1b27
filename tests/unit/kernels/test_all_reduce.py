"""Partial sums of several ranks, simulated on one device, become the same sum and norm on each of them."""

from __future__ import annotations

import random

import pytest
import torch

from tests.marks import rest_is_slow
from tests.unit.kernels.test_layer_kernels import reference_norm, relative_error

BF16 = torch.bfloat16
WIDTH, MAX_ROWS = 96, 8


def make_ranks(device: torch.device, num_ranks: int, max_programs: int = 4) -> list:
    """One `Inboxes` a rank; the regions lie in one tensor, which each holds."""
    from toka_engine.model.kernels.all_reduce import EMPTY_WORD, Inboxes

    words = Inboxes.size_bytes(MAX_ROWS, WIDTH, num_ranks) // 4
    regions = torch.full((num_ranks, words), EMPTY_WORD, dtype=torch.int32, device=device)
    addresses = torch.tensor([region.data_ptr() for region in regions], dtype=torch.int64, device=device)
    ranks = [
        Inboxes(
            rank, num_ranks, MAX_ROWS, WIDTH, addresses, torch.zeros(MAX_ROWS, dtype=torch.int32, device=device),
            max_programs,
        )
        for rank in range(num_ranks)
    ]  # fmt: skip
    make_ranks.regions = regions  # type: ignore[attr-defined]  # alive as long as the addresses are used
    return ranks


def reduce_on_all(ranks, partials, residuals, weight, eps, order) -> list[torch.Tensor]:
    """All ranks send, then all receive, each time in the given order of ranks."""
    from toka_engine.model.kernels.all_reduce import all_reduce_add_rms_norm

    outs: list[torch.Tensor] = [torch.empty(0)] * len(ranks)
    for rank in order:
        all_reduce_add_rms_norm(partials[rank], residuals[rank], weight, eps, ranks[rank], receives=False)
    for rank in reversed(order):
        outs[rank] = all_reduce_add_rms_norm(partials[rank], residuals[rank], weight, eps, ranks[rank], sends=False)
    return outs


@pytest.mark.parametrize("num_ranks", rest_is_slow([2], [2, 4]))
def test_all_ranks_have_the_same_sum_and_norm_over_turns_of_different_sizes(device, generator, num_ranks) -> None:
    ranks = make_ranks(device, num_ranks)
    weight = torch.randn(WIDTH, generator=generator, device=device).to(BF16)
    chance = random.Random(1)
    for rows in (1, MAX_ROWS, 3, 8, 1, 5, 2):
        partials = torch.randn(num_ranks, rows, WIDTH, generator=generator, device=device).to(BF16)
        residual = torch.randn(rows, WIDTH, generator=generator, device=device).to(BF16)
        residuals = [residual.clone() for _ in ranks]
        order = chance.sample(range(num_ranks), num_ranks)
        outs = reduce_on_all(ranks, partials, residuals, weight, 1e-5, order)
        total = residual.double() + partials.double().sum(0)
        for out, summed in zip(outs, residuals, strict=True):
            assert relative_error(summed, total) < 1e-2
            assert relative_error(out, reference_norm(summed, weight, 1e-5)) < 1e-2
            assert torch.equal(summed, residuals[0])
            assert torch.equal(out, outs[0])


def make_parts_whose_order_matters(num_ranks: int, rows: int, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Parts [ranks, rows, width] that cancel out, and their sum in rank order in float32, rounded once."""
    values = torch.tensor([2.0**40, -(2.0**40), 1.0, 0.5])  # every sum of three is one of bfloat16
    chosen = torch.randint(0, 4, (num_ranks, rows, WIDTH), generator=generator, device=generator.device)
    parts = values.to(chosen.device)[chosen]
    sums = [torch.zeros_like(parts[0]) for _ in range(2)]
    for index in range(num_ranks):
        sums[0] += parts[index]
        sums[1] += parts[num_ranks - 1 - index]
    assert not torch.equal(*sums)
    return parts.to(BF16), sums[0].to(BF16)


def test_parts_are_added_in_the_order_of_ranks_on_every_rank(device, generator) -> None:
    """One that began with its own part would have other bits than its peers, and other tokens in the end."""
    num_ranks = 3
    ranks = make_ranks(device, num_ranks)
    weight = torch.ones(WIDTH, device=device).to(BF16)
    parts, expected = make_parts_whose_order_matters(num_ranks, 3, generator)
    residuals = [torch.zeros(3, WIDTH, device=device).to(BF16) for _ in ranks]
    reduce_on_all(ranks, parts, residuals, weight, 1e-5, [2, 0, 1])
    assert [torch.equal(residual, expected) for residual in residuals] == [True] * num_ranks


def test_a_negative_zero_in_a_partial_is_data_and_not_an_empty_inbox(device, generator) -> None:
    ranks = make_ranks(device, 2)
    weight = torch.ones(WIDTH, device=device).to(BF16)
    partials = torch.full((2, 2, WIDTH), -0.0, device=device).to(BF16)
    partials[0, 1, 5] = 3.0
    residuals = [torch.ones(2, WIDTH, device=device).to(BF16) for _ in ranks]
    reduce_on_all(ranks, partials, residuals, weight, 1e-5, [0, 1])
    expected = torch.ones(2, WIDTH, device=device).to(BF16)
    expected[1, 5] = 4.0
    assert torch.equal(residuals[0], expected)
    assert torch.equal(residuals[1], expected)


def test_a_turn_leaves_every_inbox_empty_for_the_turn_after_the_next(device, generator) -> None:
    from toka_engine.model.kernels.all_reduce import EMPTY_WORD

    ranks = make_ranks(device, 2)
    regions = make_ranks.regions  # type: ignore[attr-defined]
    weight = torch.ones(WIDTH, device=device).to(BF16)
    for turn in range(3):
        partials = torch.randn(2, 5, WIDTH, generator=generator, device=device).to(BF16)
        residuals = [torch.zeros(5, WIDTH, device=device).to(BF16) for _ in ranks]
        reduce_on_all(ranks, partials, residuals, weight, 1e-5, [0, 1])
        assert bool((regions == EMPTY_WORD).all()), f"turn {turn}"
    assert [int(turns) for turns in ranks[0].turns] == [3] * 5 + [0] * 3


def test_a_rank_one_turn_ahead_does_not_disturb_the_one_behind(device, generator) -> None:
    """Rank 0 has received turn 1 and sends turn 2 before rank 1 receives turn 1."""
    from toka_engine.model.kernels.all_reduce import all_reduce_add_rms_norm

    ranks = make_ranks(device, 2)
    weight = torch.ones(WIDTH, device=device).to(BF16)
    partials = torch.randn(2, 2, 3, WIDTH, generator=generator, device=device).to(BF16)  # [turn, rank, rows, width]
    residuals = torch.zeros(2, 2, 3, WIDTH, device=device).to(BF16)

    def launch(turn: int, rank: int, **which: bool) -> None:
        all_reduce_add_rms_norm(partials[turn, rank], residuals[turn, rank], weight, 1e-5, ranks[rank], **which)

    launch(0, 0, receives=False)
    launch(0, 1, receives=False)
    launch(0, 0, sends=False)
    launch(1, 0, receives=False)
    launch(0, 1, sends=False)
    launch(1, 1, receives=False)
    launch(1, 1, sends=False)
    launch(1, 0, sends=False)
    for turn in range(2):
        assert relative_error(residuals[turn, 0], partials[turn].double().sum(0)) < 1e-2
        assert torch.equal(residuals[turn, 0], residuals[turn, 1])


def test_every_rank_finds_each_rank_s_pattern_in_its_region(device) -> None:
    from toka_engine.model.kernels.peer_pattern import PATTERN_WORDS, pattern_start, write_pattern

    regions = torch.zeros(4, 4, PATTERN_WORDS, dtype=torch.int32, device=device)
    addresses = torch.tensor([region.data_ptr() for region in regions], dtype=torch.int64, device=device)
    for rank in range(4):
        write_pattern(addresses, rank)
    for target in range(4):
        for source in range(4):
            start = pattern_start(source, target)
            assert torch.equal(regions[target, source].cpu(), torch.arange(start, start + PATTERN_WORDS).int())
