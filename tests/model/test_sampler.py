"""Frequencies of draws against the exact distribution, for every parameter; and what each parameter may never draw."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from toka_engine.messages import Step
from toka_engine.model.cpu.gumbel import gumbel_noise
from toka_engine.model.cpu.sampler import CpuSampler, keep_likeliest
from toka_engine.model.cpu.vocabulary import ShardedVocabulary
from toka_engine.model.ranks import Ranks
from toka_engine.model.sample_plan import Sampled, plan_sampling
from toka_engine.model.sharding import Sharding
from toka_engine.model.slot_state import HostSlots
from toka_engine.slot_parameters import SlotBatch

from tests.model.thread_ranks import run_ranks

VOCAB = 300
NUM_DRAWS = 8_000


def make_logits(vocab: int = VOCAB, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(3)) * spread


def make_state(count: int, **sampling: Any) -> HostSlots:
    """`count` slots with these parameters, scalars or one per slot."""
    state = HostSlots(count)
    state.set_up(Step(number=1, new=SlotBatch.of(np.arange(count), **sampling)))
    return state


def read_nothing(slots: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    raise AssertionError("no row asks for penalties")


def sample(logits: torch.Tensor, state: HostSlots, rows: torch.Tensor | None = None, seed: int = 0) -> Sampled:
    step = Step(number=2, decode_slots=np.arange(state.max_seqs, dtype=np.int32))
    return CpuSampler(seed, read_nothing, read_nothing)(logits, rows, plan_sampling(step, state), state)


def draw_many(logits: torch.Tensor, **sampling: Any) -> np.ndarray[Any, Any]:
    """NUM_DRAWS draws from one row of logits."""
    state = make_state(NUM_DRAWS, **sampling)
    return sample(logits[None, :], state, torch.zeros(NUM_DRAWS, dtype=torch.int64)).ids.numpy()


def expected_probabilities(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> np.ndarray[Any, Any]:
    """The definition, step by step, by sorting: temperature, top_k, top_p of what is left, min_p."""
    p = torch.softmax(logits.double() / temperature, dim=0).numpy()
    order = np.argsort(-p, kind="stable")
    kept = order[:top_k] if top_k else order
    shares = p[kept] / p[kept].sum()
    kept = kept[np.cumsum(shares) - shares < top_p]
    kept = kept[p[kept] >= min_p * p.max()]
    result = np.zeros_like(p)
    result[kept] = p[kept] / p[kept].sum()
    return result


def check_frequencies(ids: np.ndarray[Any, Any], p: np.ndarray[Any, Any]) -> None:
    """Chi-square at five standard deviations over the tokens that are expected five times or more."""
    counts = np.bincount(ids, minlength=p.size)
    assert counts[p == 0].sum() == 0
    expected = p * ids.size
    is_large = expected >= 5
    observed = np.append(counts[is_large], counts[~is_large].sum())
    wanted = np.append(expected[is_large], expected[~is_large].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    chi_square = ((observed - wanted) ** 2 / wanted).sum()
    freedom = max(1, wanted.size - 1)
    assert chi_square <= freedom + 5 * np.sqrt(2 * freedom)


CASES: dict[str, dict[str, float]] = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 1.7},
    "top_k": {"top_k": 17},
    "top_p": {"top_p": 0.8},
    "narrow top_p": {"top_p": 0.05},
    "min_p": {"min_p": 0.1},
    "top_k and top_p": {"top_k": 40, "top_p": 0.7},
    "all": {"temperature": 1.3, "top_k": 100, "top_p": 0.9, "min_p": 0.02},
    "top_k beyond the vocabulary": {"top_k": 10_000},
}


@pytest.mark.parametrize("bit", [0, 31, 32, 62])
def test_engine_seeds_that_differ_in_any_bit_draw_other_tokens(bit: int) -> None:
    logits, state = make_logits().expand(64, -1), make_state(64)
    first, again, other = (sample(logits, state, seed=seed).ids for seed in (5, 5, 5 ^ 1 << bit))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", list(CASES))
def test_frequencies_of_draws_match_the_distribution(name: str) -> None:
    logits = make_logits()
    check_frequencies(draw_many(logits, **CASES[name]), expected_probabilities(logits, **CASES[name]))


@pytest.mark.parametrize("name", list(CASES))
def test_frequencies_over_seeds_match_the_distribution(name: str) -> None:
    logits = make_logits()
    ids = draw_many(logits, seed=np.arange(NUM_DRAWS), **CASES[name])
    check_frequencies(ids, expected_probabilities(logits, **CASES[name]))


def test_frequencies_over_the_positions_of_one_seed_match_the_distribution() -> None:
    logits = make_logits()
    check_frequencies(draw_many(logits, seed=42, num_sampled=np.arange(NUM_DRAWS)), expected_probabilities(logits))


def test_a_vocabulary_that_is_flat_over_its_first_candidates_is_cut_exactly() -> None:
    logits = make_logits(2000, spread=0.05)  # 1,190 are kept: more than the first candidates, and each drawn often
    check_frequencies(draw_many(logits, top_p=0.6), expected_probabilities(logits, top_p=0.6))


def test_equal_logits_at_the_cut_keep_the_lowest_ids() -> None:
    logits = torch.zeros(1, 10)
    one = torch.ones(1)
    kept = keep_likeliest(logits, one, torch.tensor([3]), one, one * 0)
    assert torch.isfinite(kept[0]).nonzero().flatten().tolist() == [0, 1, 2]
    kept = keep_likeliest(logits, one, torch.tensor([0]), one * 0.35, one * 0)
    assert torch.isfinite(kept[0]).nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_rows_with_different_parameters_in_one_batch_do_not_touch_each_other() -> None:
    logits = make_logits()
    count = 4 * 3000
    state = make_state(
        count,
        temperature=np.tile([0.0, 1.0, 1.0, 0.7], 3000),
        top_k=np.tile([0, 5, 0, 0], 3000),
        top_p=np.tile([1.0, 1.0, 1.0, 0.5], 3000),
        seed=np.where(np.arange(count) % 4 == 2, np.arange(count), -1),
    )
    ids = sample(logits[None, :], state, torch.zeros(count, dtype=torch.int64)).ids.numpy()
    assert (ids[0::4] == int(logits.argmax())).all()
    check_frequencies(ids[1::4], expected_probabilities(logits, top_k=5))
    check_frequencies(ids[2::4], expected_probabilities(logits))
    check_frequencies(ids[3::4], expected_probabilities(logits, temperature=0.7, top_p=0.5))


def test_greedy_takes_the_first_of_equal_maxima() -> None:
    logits = torch.zeros(2, 1000)
    logits[0, [700, 300]] = 5.0
    ids = sample(logits, make_state(2, temperature=0.0)).ids.tolist()
    assert ids == [300, 0]


def test_a_row_that_is_not_finite_gives_minus_one_and_leaves_the_others_alone() -> None:
    logits = make_logits().repeat(6, 1)
    logits[1, 5], logits[2, 6], logits[3, 7] = float("nan"), float("inf"), float("-inf")
    for sampling in ({"temperature": 0.0}, {"seed": 1}, {"top_k": 1}, {"temperature": 0.01}):
        ids = sample(logits, make_state(6, num_logprobs=2, **sampling)).ids
        best = int(logits[0].argmax())
        assert ids[[1, 2, 3]].tolist() == [-1, -1, -1]
        assert (ids[[0, 4, 5]] >= 0).all()
        assert "seed" in sampling or ids[0] == best


def test_the_same_seed_and_position_draw_the_same_token_in_any_row() -> None:
    logits = make_logits().repeat(50, 1)
    seeds = np.arange(50) % 5
    ids = sample(logits, make_state(50, seed=seeds)).ids.numpy()
    for seed in range(5):
        assert len(set(ids[seeds == seed].tolist())) == 1
    assert len(set(ids.tolist())) > 1


def test_seeded_tokens_survive_small_differences_of_the_logits() -> None:
    logits = make_logits(20_000, spread=0.5).repeat(400, 1)
    state = make_state(400, seed=np.arange(400))
    noisy = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(5)) * 1e-3
    same = (sample(logits, state).ids == sample(noisy, state).ids).float().mean()
    assert same >= 0.98


def test_gumbel_noise_has_the_moments_of_its_distribution_and_no_correlation_between_rows() -> None:
    noise = gumbel_noise(torch.tensor([1, 2, 1]), torch.tensor([0, 0, 1]), 200_000).double()
    assert torch.isfinite(noise).all()
    assert (noise.mean(dim=1) - 0.5772).abs().max() < 0.02
    assert (noise.var(dim=1) - np.pi**2 / 6).abs().max() < 0.05
    assert (torch.corrcoef(noise) - torch.eye(3)).abs().max() < 0.02


def test_logprobs_are_of_the_unscaled_distribution() -> None:
    logits = make_logits().repeat(3, 1)
    sampled = sample(logits, make_state(3, temperature=0.3, top_k=2, num_logprobs=[0, 4, -1]))
    reference = torch.log_softmax(logits, dim=1)
    assert sampled.logprobs is not None
    assert sampled.top_tokens is not None
    assert sampled.top_logprobs is not None
    rows = torch.arange(3)
    assert torch.allclose(sampled.logprobs, reference[rows, sampled.ids.long()], atol=1e-5)
    best = reference[1].topk(4)
    assert sampled.top_tokens.tolist() == [best.indices.tolist()]
    assert torch.allclose(sampled.top_logprobs[0], best.values, atol=1e-5)


def test_top_logprobs_beyond_what_a_row_asks_for_are_marked() -> None:
    sampled = sample(make_logits().repeat(2, 1), make_state(2, num_logprobs=[1, 3]))
    assert sampled.top_tokens is not None
    assert (sampled.top_tokens[0, 1:] == -1).all()
    assert (sampled.top_tokens[1] >= 0).all()


def sample_on(size: int, logits: torch.Tensor, state: HostSlots, rows: torch.Tensor | None = None) -> list[Sampled]:
    """Return what each of `size` ranks samples, each given its part of the logits."""
    step = Step(number=2, decode_slots=np.arange(state.max_seqs, dtype=np.int32))

    def work(ranks: Ranks) -> Sampled:
        vocabulary = ShardedVocabulary(ranks, logits.shape[1])
        begin, end = Sharding(ranks.rank, size).split_vocabulary(logits.shape[1])
        plan = plan_sampling(step, state)
        return CpuSampler(5, read_nothing, read_nothing, vocabulary)(
            logits[:, begin:end].contiguous(), rows, plan, state
        )

    return run_ranks(size, work)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(
    "parameters", [{}, {"temperature": 0.6}, {"top_k": 7}, {"top_p": 0.8, "temperature": 1.3}, {"min_p": 0.05}]
)
def test_ranks_with_parts_of_the_vocabulary_draw_from_the_exact_distribution(
    size: int, parameters: dict[str, Any]
) -> None:
    logits = make_logits()
    state = make_state(NUM_DRAWS, **parameters)
    first, *others = sample_on(size, logits[None, :], state, torch.zeros(NUM_DRAWS, dtype=torch.int64))
    check_frequencies(first.ids.numpy(), expected_probabilities(logits, **parameters))
    assert all(torch.equal(other.ids, first.ids) for other in others)


@pytest.mark.parametrize(
    "vocab", [40, 300]
)  # a part of 40 over two has 8 tokens, fewer than the logprobs that are asked
@pytest.mark.parametrize("spread", [0.0, 2.0])  # 0: all tokens are equal, so each part has the best one
def test_ranks_agree_with_one_on_greedy_and_seeded_rows_and_on_logprobs(vocab: int, spread: float) -> None:
    logits = torch.randn(64, vocab, generator=torch.Generator().manual_seed(9)) * spread
    row = np.arange(64)
    state = make_state(
        64,
        temperature=np.where(row % 2, 0.9, 0.0),
        seed=np.where(row % 2, row, -1),
        top_k=np.where(row % 3, 0, 11),
        num_logprobs=np.where(row % 5, row % 21, -1),
        num_sampled=row,
    )
    whole = sample(logits, state)
    for each in sample_on(2, logits, state):
        assert torch.equal(each.ids, whole.ids)
        torch.testing.assert_close(each.logprobs, whole.logprobs)
        torch.testing.assert_close(each.top_logprobs, whole.top_logprobs)
        if spread:
            assert torch.equal(each.top_tokens, whole.top_tokens)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("token", [0, 150, 299])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bad_logit_in_one_part_makes_the_row_bad_on_all_ranks(bad: float, token: int, temperature: float) -> None:
    logits = torch.stack([make_logits(), make_logits()])
    logits[1, token] = bad
    state = make_state(2, temperature=temperature, seed=[-1, 4], num_logprobs=2)
    for each in sample_on(3, logits, state):
        assert each.ids[0] >= 0
        assert each.ids[1] == -1
        assert each.logprobs is not None
        assert each.logprobs.isnan().tolist() == [False, True]
