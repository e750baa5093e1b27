"""Ranks that hold parts of the vocabulary sample what one GPU samples from the whole. The ranks are simulated."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.marks import rest_is_slow
from tests.unit.kernels.test_sampling_kernels import ON_GPU, Bench, chi_square_is_plausible, kept_probabilities

VOCAB, MAX_SAMPLES = 150, 8
SEEDS = [-1, 5, -1, 99, 7]
TEMPERATURES = [0.0, 0.7, 1.3, 1.0, 0.0]


class Rank:
    """One rank's sampler over its part of `logits`."""

    def __init__(self, rank: int, num_ranks: int, regions: torch.Tensor, logits: torch.Tensor, **fields: Any) -> None:
        from toka_engine.model.kernels.sharded_sampling import CandidateInboxes
        from toka_engine.model.sharding import Sharding

        self.first, end = Sharding(rank, num_ranks).split_vocabulary(logits.shape[1])
        device, n = logits.device, logits.shape[0]
        self.bench = Bench(logits[:, self.first : end].contiguous(), list(range(n)), **fields)
        addresses = torch.tensor([region.data_ptr() for region in regions], dtype=torch.int64, device=device)
        turns = torch.zeros(MAX_SAMPLES, dtype=torch.int32, device=device)
        disagreement = torch.zeros(3, dtype=torch.int32, device=device)
        self.inboxes = CandidateInboxes(rank, num_ranks, MAX_SAMPLES, addresses, turns, disagreement, 3)

    def prepare(self, with_logprobs: bool) -> None:
        from toka_engine.model.kernels.sampling import block_stats
        from toka_engine.model.kernels.seeded_sampling import add_noise

        bench = self.bench
        seeded = (bench.state["seed"] >= 0).nonzero().flatten().int()
        block_stats(bench.logits, bench.samples, bench.state, bench.work, with_logprobs)
        add_noise(bench.logits, bench.samples, seeded, bench.state, bench.work, self.first)

    def sample(self, with_logprobs: bool, step: int, **which: bool) -> None:
        from toka_engine.model.kernels.sharded_sampling import sample_sharded

        bench = self.bench
        random = torch.tensor([7, step], dtype=torch.int64, device=bench.logits.device)
        has_seeded = bool((bench.state["seed"] >= 0).any())
        logprobs = bench.logprobs if with_logprobs else None
        sample_sharded(
            bench.logits, self.first, bench.samples, bench.state, bench.work, random, bench.ids, logprobs, has_seeded,
            self.inboxes, **which,
        )  # fmt: skip


class Ranks:
    def __init__(self, num_ranks: int, logits: torch.Tensor, **fields: Any) -> None:
        from toka_engine.model.kernels.all_reduce import EMPTY_WORD
        from toka_engine.model.kernels.sharded_sampling import CandidateInboxes

        words = CandidateInboxes.size_bytes(MAX_SAMPLES, num_ranks) // 4
        self.regions = torch.full((num_ranks, words), EMPTY_WORD, dtype=torch.int32, device=logits.device)
        self.empty = EMPTY_WORD
        self.each = [Rank(rank, num_ranks, self.regions, logits, **fields) for rank in range(num_ranks)]

    def draw(self, with_logprobs: bool = False, steps: tuple[int, ...] = ()) -> list[SimpleNamespace]:
        """One sample of every row on every rank; `steps`: by rank, other than how often was drawn."""
        numbers = steps or (self.each[0].bench.step,) * len(self.each)
        for rank, step in zip(self.each, numbers, strict=True):
            rank.prepare(with_logprobs)
            rank.sample(with_logprobs, step, receives=False)
        for rank, step in reversed(list(zip(self.each, numbers, strict=True))):
            rank.sample(with_logprobs, step, sends=False)
            rank.bench.step += 1
        assert bool((self.regions == self.empty).all())
        return [SimpleNamespace(ids=rank.bench.ids.clone(), logprobs=rank.bench.logprobs.clone()) for rank in self.each]


@pytest.mark.parametrize("num_ranks", rest_is_slow([3], [2, 3]))
def test_greedy_and_seeded_rows_give_the_tokens_and_logprobs_of_one_gpu(device, generator, num_ranks) -> None:
    logits = torch.randn(5, VOCAB, generator=generator, device=device) * 2
    fields = {"seed": torch.tensor(SEEDS), "temperature": torch.tensor(TEMPERATURES)}
    alone, ranks = Bench(logits, list(range(5)), **fields), Ranks(num_ranks, logits, **fields)
    same = torch.tensor([0, 1, 3, 4], device=device)  # the third row has neither a seed nor temperature 0
    for _ in range(2):
        expected = alone.draw(with_logprobs=True)
        every = ranks.draw(with_logprobs=True)
        for found in every:
            assert torch.equal(found.ids, every[0].ids)
            assert torch.equal(found.logprobs, every[0].logprobs)
            assert torch.equal(found.ids[same], expected[same])
            torch.testing.assert_close(found.logprobs[same], alone.logprobs[same], atol=1e-5, rtol=1e-5)
    for rank in ranks.each:
        assert torch.equal(rank.bench.state["num_sampled"], alone.state["num_sampled"])
        assert torch.equal(rank.bench.state.last_token, every[0].ids)


@pytest.mark.slow
def test_frequencies_match_the_distribution_over_the_whole_vocabulary(device, generator) -> None:
    vocab, steps = (4000, 1500) if ON_GPU else (34, 6)
    logits = torch.randn(1, vocab, generator=generator, device=device) * 1.5
    ranks = Ranks(2, logits.expand(MAX_SAMPLES, -1).contiguous(), temperature=torch.full((MAX_SAMPLES,), 0.8))
    drawn = torch.cat([ranks.draw()[0].ids for _ in range(steps)])
    counts = np.bincount(drawn.cpu().numpy(), minlength=vocab)
    assert chi_square_is_plausible(counts, kept_probabilities(logits[0], 0.8, 0, 1.0, 0.0).cpu().numpy())


def test_of_equal_maxima_in_several_parts_the_lowest_token_wins(device) -> None:
    logits = torch.zeros(3, VOCAB, device=device)
    logits[0, [20, 100]] = 5.0
    logits[1, 149] = 5.0
    ranks = Ranks(4, logits, temperature=torch.zeros(3))
    assert [found.ids.tolist() for found in ranks.draw()] == [[20, 149, 0]] * 4


@pytest.mark.parametrize("seed", [-1, 3])
def test_a_part_of_minus_infinities_is_fine_and_one_value_that_is_not_finite_is_not(device, generator, seed) -> None:
    logits = torch.randn(5, VOCAB, generator=generator, device=device)
    logits[0, :96] = -torch.inf
    logits[1, 96:] = -torch.inf
    logits[2] = -torch.inf
    logits[3, 3] = torch.nan
    logits[4, 149] = torch.inf
    ranks = Ranks(2, logits, seed=torch.full((5,), seed))
    for found in ranks.draw(with_logprobs=True):
        ids = found.ids.tolist()
        assert ids[0] >= 80
        assert 0 <= ids[1] < 96
        assert ids[2:] == [-1, -1, -1]
        assert found.logprobs.isnan().tolist() == [False, False, True, True, True]


def test_ranks_with_different_steps_in_hand_say_so_with_both_numbers(device, generator) -> None:
    from toka_engine.model.kernels.sharded_sampling import DISAGREES

    ranks = Ranks(2, torch.randn(2, VOCAB, generator=generator, device=device))
    assert all(DISAGREES not in found.ids for found in ranks.draw())
    assert [found.ids.tolist() for found in ranks.draw(steps=(4, 5))] == [[DISAGREES] * 2] * 2
    (first, second) = (rank.inboxes.disagreement.tolist() for rank in ranks.each)
    assert first == [1, second[2], second[1]]
    assert first[1] != first[2]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_gathered_rows_are_those_of_the_whole_vocabulary_on_every_rank(device, generator, num_ranks) -> None:
    from toka_engine.model.kernels.row_gathering import NUM_BUFFERS, RowBuffers, gather_rows
    from toka_engine.model.sharding import Sharding

    vocab, max_rows = 149, 3
    row_size = RowBuffers.row_size(vocab)
    regions = torch.full((num_ranks, NUM_BUFFERS, max_rows, row_size), torch.nan, device=device)
    flags = torch.zeros(num_ranks, num_ranks, dtype=torch.int32, device=device)

    def addresses(each: torch.Tensor) -> torch.Tensor:
        return torch.tensor([region.data_ptr() for region in each], dtype=torch.int64, device=device)

    ranges = [Sharding(rank, num_ranks).split_vocabulary(vocab) for rank in range(num_ranks)]
    buffers = [
        RowBuffers(
            rank, num_ranks, ranges[rank][0], addresses(regions), addresses(flags),
            torch.zeros(1, dtype=torch.int32, device=device), regions[rank], vocab,
        )
        for rank in range(num_ranks)
    ]  # fmt: skip
    for turn, rows in enumerate(([0], [4, 2, 0], [1, 1])):
        logits = torch.randn(5, vocab, generator=generator, device=device)
        chosen = torch.tensor(rows, dtype=torch.int32, device=device)
        parts = [logits[:, begin:end].contiguous() for begin, end in ranges]
        index = turn % NUM_BUFFERS
        for rank in reversed(range(num_ranks)):
            gather_rows(parts[rank], chosen, buffers[rank], index, receives=False)
        for rank in range(num_ranks):
            whole = gather_rows(parts[rank], chosen, buffers[rank], index, sends=False)
            assert torch.equal(whole, logits[chosen.long()])
    assert [int(each.turns) for each in buffers] == [3] * num_ranks
