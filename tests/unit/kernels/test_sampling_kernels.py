"""The sampler draws from exactly the distribution that was asked for."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toka_engine.slot_parameters import FILTER, SLOT_COLUMNS

from tests.marks import rest_is_slow

ON_GPU = os.environ.get("TOKA_TEST_KERNELS") == "gpu"
"""The interpreter takes a millisecond per operation, so there the same tests draw few samples."""


class Bench:
    """A sampler over one set of logits: sample i is drawn from logits row rows[i] for slot i."""

    def __init__(
        self, logits: torch.Tensor, rows: list[int], block: int = 64, room: int = 64, **fields: object
    ) -> None:
        from toka_engine.model.kernels.device_slots import DeviceSlots
        from toka_engine.model.kernels.sampling import Samples, Workspace

        device = logits.device
        n = len(rows)
        self.logits = logits
        self.samples = Samples(
            torch.tensor(rows, dtype=torch.int32, device=device),
            torch.arange(n, dtype=torch.int32, device=device),
        )
        self.state = DeviceSlots(n, device)
        self.state["temperature"].fill_(1.0)
        for name, value in fields.items():
            self.state[name].copy_(torch.as_tensor(value))
        self.work = Workspace.allocate(n, logits.shape[1], device, block=block, room=room)
        self.ids = torch.zeros(n, dtype=torch.int32, device=device)
        self.logprobs = torch.zeros(n, device=device)
        self.step = 0

    def draw(self, with_logprobs: bool = False, engine_seed: int = 7) -> torch.Tensor:
        from toka_engine.model.kernels.filtering import apply_filters
        from toka_engine.model.kernels.sampling import block_stats, sample_tokens
        from toka_engine.model.kernels.seeded_sampling import add_noise
        from toka_engine.model.kernels.top_k_gathering import gather_best
        from toka_engine.model.kernels.top_p_rejection import sample_by_rejection

        state = self.state
        filters = [column for column in SLOT_COLUMNS if column.part == FILTER]
        filtered = torch.stack([state[column.name] != column.default for column in filters]).any(dim=0)
        seeded = state["seed"] >= 0
        block_stats(self.logits, self.samples, state, self.work, with_logprobs)
        random = torch.tensor([engine_seed, self.step], dtype=torch.int64, device=self.logits.device)
        chosen = filtered.nonzero().flatten().int()
        sample_by_rejection(self.logits, self.samples, chosen, state, self.work, random)
        gather_best(self.logits, self.samples, chosen, state, self.work)
        apply_filters(self.logits, self.samples, chosen, state, self.work)
        add_noise(self.logits, self.samples, seeded.nonzero().flatten().int(), state, self.work)
        logprobs = self.logprobs if with_logprobs else None
        sample_tokens(self.logits, self.samples, state, self.work, random, self.ids, logprobs, bool(seeded.any()))
        self.step += 1
        return self.ids.clone()


def kept_probabilities(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> torch.Tensor:
    """The distribution by a full sort, ties with the last kept token kept."""
    scaled = logits.double() / temperature
    keep = torch.ones_like(scaled, dtype=torch.bool)
    if 0 < top_k < scaled.numel():
        keep &= scaled >= scaled.sort(descending=True).values[top_k - 1]
    if top_p < 1:
        probabilities = torch.where(keep, scaled, -torch.inf).softmax(0)
        ordered, order = probabilities.sort(descending=True)
        count = int((ordered.cumsum(0) < top_p).sum()) + 1
        keep &= scaled >= scaled[order[min(count, scaled.numel()) - 1]]
    if min_p > 0:
        keep &= scaled >= scaled.max() + np.log(min_p)
    return torch.where(keep, scaled, -torch.inf).softmax(0)


def near_limits(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """The rows in which rounding may decide: the running mass meets top_p, or a token the ratio min_p, within what
    fp32 tells."""
    x = logits.double()
    result = (x - x.max() - temperature * np.log(max(min_p, 1e-30))).abs() < 1e-4 * x.std()
    if top_p < 1:
        ordered = x.sort(descending=True).values
        mass = kept_probabilities(logits, temperature, top_k, 1.0, 0.0).sort(descending=True).values.cumsum(0)
        close = (mass - top_p).abs() < 1e-5
        result |= torch.isin(x, torch.cat([ordered[close], ordered[1:][close[:-1]]]))
    return result


def chi_square_is_plausible(counts: np.ndarray, probabilities: np.ndarray) -> bool:
    """Five standard deviations of the chi-square statistic, small cells joined."""
    expected = probabilities * counts.sum()
    order = np.argsort(expected)
    groups: list[tuple[float, float]] = []
    have, want = 0.0, 0.0
    for i in order:
        have, want = have + counts[i], want + expected[i]
        if want >= 5:
            groups.append((have, want))
            have, want = 0.0, 0.0
    if groups and want:
        groups[-1] = (groups[-1][0] + have, groups[-1][1] + want)
    statistic = sum((h - w) ** 2 / w for h, w in groups)
    degrees = max(1, len(groups) - 1)
    return bool(statistic < degrees + 5 * np.sqrt(2 * degrees))


CASES = [
    pytest.param({}, id="plain"),
    pytest.param({"temperature": 0.5}, id="cold"),
    pytest.param({"temperature": 2.0, "top_k": 7}, id="top_k"),
    pytest.param({"top_p": 0.6}, id="top_p"),
    pytest.param({"min_p": 0.1}, id="min_p"),
    pytest.param({"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.05}, id="all"),
]


@pytest.mark.parametrize("is_seeded", rest_is_slow([False], [False, True]))
@pytest.mark.parametrize("options", CASES)
def test_frequencies_match_the_asked_distribution(device, generator, options, is_seeded) -> None:
    vocab, n, steps = (5003, 20_000, 5) if ON_GPU else (60, 6, 1)
    logits = (torch.randn(1, vocab, generator=generator, device=device) * 1.5).bfloat16()
    if is_seeded:
        options = options | {"seed": torch.arange(n) * 1_000_003}
    bench = Bench(logits, [0] * n, block=1024 if ON_GPU else 32, **options)
    ids = torch.cat([bench.draw() for _ in range(steps)]).cpu().numpy()
    named = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    named.pop("seed", None)
    probabilities = kept_probabilities(logits[0].cpu(), **named).numpy()
    counts = np.bincount(ids, minlength=vocab)
    assert counts[probabilities == 0].sum() == 0
    assert chi_square_is_plausible(counts, probabilities)


@pytest.mark.parametrize("options", rest_is_slow([{}], [{}, {"top_p": 0.9}]), ids=["plain", "rejection"])
def test_engine_seeds_that_differ_in_any_bit_draw_other_tokens(device, generator, options) -> None:
    logits = torch.randn(1, 64, generator=generator, device=device) * 0.1
    seeds = (5, 5, *(5 ^ 1 << bit for bit in (0, 31, 32, 62)))
    first, again, *others = (Bench(logits, [0] * 16, block=32, **options).draw(engine_seed=seed) for seed in seeds)
    assert torch.equal(first, again)
    assert [torch.equal(first, other) for other in others] == [False] * 4


@pytest.mark.slow
@settings(max_examples=400 if ON_GPU else 12, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    top_k=st.integers(0, 60),
    top_p=st.sampled_from([0.05, 0.3, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    temperature=st.sampled_from([0.1, 1.0, 5.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    spread=st.sampled_from([0.01, 1.0, 30.0]),
    sizes=st.sampled_from([(16, 64), (16, 16), (64, 64), (64, 1)]),
)
def test_the_kept_tokens_are_those_of_a_full_sort(seed, top_k, top_p, min_p, temperature, dtype, spread, sizes) -> None:
    """Samples 0 to 3 are drawn without a seed; the limit of the last one, which has one, is known.

    `sizes`: of a block, and of the room for gathered logits, in which those that top_k may keep have a place or not.
    """
    block, room = sizes
    device = torch.device("cuda" if ON_GPU else "cpu")
    logits = (torch.randn(1, 40, generator=torch.Generator().manual_seed(seed)) * spread - 3).to(dtype)
    asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    bench = Bench(logits.to(device), [0] * 5, block, room, seed=torch.tensor([-1, -1, -1, -1, 5]), **asked)
    drawn = bench.draw().cpu()
    expected = kept_probabilities(logits[0], temperature, top_k, top_p, min_p) > 0
    at_edge = near_limits(logits[0], temperature, top_k, top_p, min_p)
    kept = logits[0].float() >= bench.work.threshold[4].cpu()
    assert not bool(((kept != expected) & ~at_edge).any())
    # Where it is off by rounding, the draw itself stays inside what the kernel kept.
    assert bool(kept[drawn[4].item()])
    assert bool((expected | at_edge)[drawn[:4].long()].all())


@pytest.mark.parametrize("dtype", rest_is_slow([torch.float32], [torch.float32, torch.bfloat16]))
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.95), (3, 1.0), (3, 0.9), (50, 0.95), (1500, 0.9)])
def test_limits_in_a_large_vocabulary_are_those_of_a_full_sort(generator, device, dtype, top_k, top_p) -> None:
    """Logits of a peaked distribution, a wide one and a flat one; top_k below and above the number of blocks."""
    vocab, block = (128_256, 4096) if ON_GPU else (2_900, 1024)
    logits = torch.randn(3, vocab, generator=generator, device=device) * torch.tensor([[2.0], [3.0], [0.5]]).to(device)
    likely = torch.randperm(vocab, generator=generator, device=device)[:30]
    logits[0, likely] += torch.linspace(6, 16, 30, device=device)
    logits = logits.to(dtype)
    bench = Bench(logits, [0, 1, 2], block, 1024, temperature=0.8, top_k=top_k, top_p=top_p, seed=torch.arange(3))
    bench.draw()
    for row, threshold in zip(logits.float().cpu(), bench.work.threshold.cpu(), strict=True):
        expected = kept_probabilities(row, 0.8, top_k, top_p, 0.0) > 0
        wrong = (row >= threshold) != expected
        assert not bool((wrong & ~near_limits(row, 0.8, top_k, top_p, 0.0)).any())


@pytest.mark.parametrize("is_guess", [False, True])
def test_where_gathered_logits_are_too_many_or_too_few_all_are_searched(device, is_guess) -> None:
    """The best of the fourth block is a bound that 49 logits reach, and room is for 16; or a guess that 4 reach."""
    logits = torch.arange(64.0, device=device)
    logits[48:] -= 100
    if is_guess:
        logits[::16] += 1000
    top_k = 10 if is_guess else 4
    bench = Bench(logits[None], [0], 16, 16, top_k=top_k, seed=torch.tensor([1]))
    bench.draw()
    assert torch.equal(logits >= bench.work.threshold[0], logits >= logits.sort(descending=True).values[top_k - 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temperature_zero_takes_the_first_maximum(device, generator, dtype) -> None:
    logits = torch.randn(4, 100, generator=generator, device=device).to(dtype)
    logits[3, [90, 40, 99]] = 9.0
    bench = Bench(logits, list(range(4)), temperature=0.0)
    expected = logits.float().argmax(-1)
    expected[3] = 40
    assert bench.draw().tolist() == expected.tolist()
    assert bench.state.last_token.tolist() == expected.tolist()


def test_logprobs_are_of_the_unscaled_distribution(device, generator) -> None:
    logits = torch.randn(3, 150, generator=generator, device=device) * 3
    asked = {"temperature": [0.0, 0.3, 4.0, 1.0, 1.0], "top_k": [0, 3, 0, 0, 3], "top_p": [1.0, 1.0, 1.0, 0.2, 0.2]}
    bench = Bench(logits, [2, 0, 1, 2, 0], seed=[-1, -1, 5, -1, -1], **asked)
    ids = bench.draw(with_logprobs=True).long()
    expected = logits[[2, 0, 1, 2, 0]].double().log_softmax(-1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(bench.logprobs.double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("is_seeded", [False, True])
def test_a_row_that_is_not_finite_gives_minus_one_and_leaves_the_others(device, generator, bad, is_seeded) -> None:
    logits = torch.randn(4, 100, generator=generator, device=device)
    alone = Bench(logits.clone(), [0, 1, 2, 3])
    logits[2, 99] = bad
    seed = torch.tensor([1, 2, 3, 4]) if is_seeded else -1
    bench = Bench(logits, [0, 1, 2, 3], top_k=[0, 5, 5, 0], seed=seed)
    ids = bench.draw(with_logprobs=True)
    assert ids[2] == -1
    assert bool(((ids[[0, 1, 3]] >= 0) & (ids[[0, 1, 3]] < 100)).all())
    if not is_seeded:
        assert torch.equal(ids[[0, 3]], alone.draw()[[0, 3]])


def test_a_seeded_draw_depends_on_seed_and_draw_number_only(device, generator) -> None:
    logits = torch.randn(1, 120, generator=generator, device=device)
    seeds = torch.tensor([11, 12, 11, 13])
    one = Bench(logits, [0] * 4, seed=seeds)
    first, second = one.draw(), one.draw()
    assert first[0] == first[2]
    assert len({*first.tolist(), *second.tolist()}) > 3
    other = Bench(logits.repeat(3, 1), [2, 1], seed=torch.tensor([12, 11]), num_sampled=torch.tensor([1, 0]))
    assert other.draw().tolist() == [second[1].item(), first[0].item()]


def test_two_steps_draw_different_tokens(device, generator) -> None:
    logits = torch.zeros(1, 128, device=device)
    bench = Bench(logits, [0] * 8, block=128)
    draws = torch.cat([bench.draw(), bench.draw()])
    assert len(set(draws.tolist())) > 11
