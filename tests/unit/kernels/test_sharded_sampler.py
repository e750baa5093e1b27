"""The sampler of a rank, of which there is one here, gives each row what the sampler of one GPU gives it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from toka_engine.errors import RanksDisagreeError
from toka_engine.messages import LogitEdits
from toka_engine.model.barred_words import WordArrays, WordPlan
from toka_engine.model.logit_edits import TokenEdits, plan_edits
from toka_engine.model.sample_plan import Penalties, Sampled, SamplePlan
from toka_engine.model.sharding import Sharding

from tests.marks import rest_is_slow

VOCAB, PAGE_SIZE = 90, 4
TEMPERATURES = [0.0, 0.8, 0.0, 1.1, 0.7, 0.0]
SEEDS = [-1, 5, -1, 6, 7, -1]
"""Every row is greedy or has a seed, so that its token does not depend on what is drawn for others."""


def make_links(device: torch.device) -> Any:
    from toka_engine.model.cuda.peer_links import LinkSizes, find_begins, make_links
    from toka_engine.model.kernels.all_reduce import EMPTY_WORD

    sizes = LinkSizes(32, 8, 8, VOCAB)
    begins = find_begins(1, sizes)
    region = torch.zeros(begins[-1] // 4, device=device)
    region.view(torch.int32)[begins[1] // 4 : begins[3] // 4] = EMPTY_WORD
    addresses = torch.tensor([region.data_ptr()], dtype=torch.int64, device=device)
    return make_links(Sharding(0, 1), sizes, 0, 4, addresses, begins, region)


class Both:
    """The two samplers, each with slots of its own, over sequences whose tokens are in pages."""

    def __init__(self, device: torch.device) -> None:
        from toka_engine.model.cuda.sampler import CudaSampler
        from toka_engine.model.cuda.sharded_sampler import ShardedSampler
        from toka_engine.model.kernels.device_slots import DeviceSlots

        n = len(SEEDS)
        self.slots = [DeviceSlots(n, device) for _ in range(2)]
        for slots in self.slots:
            slots["temperature"].copy_(torch.tensor(TEMPERATURES))
            slots["seed"].copy_(torch.tensor(SEEDS))
            slots["top_k"].copy_(torch.tensor([0, 4, 0, 0, 0, 0]))
            slots["top_p"].copy_(torch.tensor([1, 1, 1, 0.6, 1, 1]))
        table = torch.arange(2 * n, dtype=torch.int32, device=device).view(n, 2)
        page_tokens = torch.arange(2 * n * PAGE_SIZE, dtype=torch.int32, device=device).view(-1, PAGE_SIZE) % VOCAB
        attention: Any = SimpleNamespace(table=table, page_tokens=page_tokens)
        self.single = CudaSampler(3, self.slots[0], attention, n, VOCAB)
        self.links = make_links(device)
        self.sharded = ShardedSampler(3, self.slots[1], attention, n, self.links, VOCAB)

    def sample(self, logits: torch.Tensor, plan: SamplePlan) -> tuple[Sampled, Sampled]:
        rows = torch.arange(plan.slots.size, dtype=torch.int32, device=logits.device)
        state: Any = None
        return self.single(logits.clone(), rows, plan, state), self.sharded(logits.clone(), rows, plan, state)


def rows(*values: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array(values, np.int64)


def make_plan(**changes: Any) -> SamplePlan:
    n = len(SEEDS)
    plan = {
        "slots": np.arange(n, dtype=np.int32), "greedy": rows(0, 2, 5), "drawn": rows(), "seeded": rows(1, 3, 4),
        "filtered": rows(), "has_logprobs": False, "top": rows(), "top_counts": np.zeros(0, np.int32), "top_width": 0,
    }  # fmt: skip
    return SamplePlan(**{**plan, **changes})


def make_penalties() -> Penalties:
    numbers = np.array([2, 4], np.int32)
    factors = (np.array([value, value], np.float32) for value in (0.5, 0.25, 1.3))
    return Penalties(rows(2, 4), numbers, numbers + 3, numbers, *factors)


def make_edits() -> Any:
    ids = np.array([3, 80], np.int32)
    edits = TokenEdits(LogitEdits(ids, np.array([9.0, -np.inf], np.float32), ids[:0], ids[:0], 0))
    return plan_edits(rows(0, 5), np.array([0, 5], np.int32), [edits, edits], np.zeros(2, np.int32))


def make_words(best: list[int], second: list[int]) -> WordPlan:
    """Bars the best token of rows 0, 2 and 5, whose sequences end as the words begin; of rows 2 and 5 another word does
    not fit, which ends with the second best. Slot s has token 8 * s + p at position p.
    """
    parts = [  # row, last token, tokens before it, the position of the first of them
        (0, best[0], [4, 5], 4),
        (2, second[2], [21, 5], 5),
        (2, best[2], [22], 6),
        (2, best[2], [20, 21, 22], 4),
        (5, second[5], [40, 42], 0),
        (5, best[5], [41], 1),
    ]
    place = {0: 0, 2: 1, 5: 2}
    sizes = np.array([len(tokens) for _, _, tokens, _ in parts], np.int32)

    def joined(lists: list[list[int]]) -> np.ndarray[Any, np.dtype[np.int32]]:
        return np.array([each for some in lists for each in some], np.int32)

    arrays = WordArrays(
        np.array([place[row] for row, *_ in parts], np.int32),
        np.array([last for _, last, _, _ in parts], np.int32),
        sizes,
        np.repeat(np.arange(len(parts), dtype=np.int32), sizes),
        joined([tokens for _, _, tokens, _ in parts]),
        joined([[row] * len(tokens) for row, _, tokens, _ in parts]),
        joined([[*range(first, first + len(tokens))] for _, _, tokens, first in parts]),
    )
    return WordPlan(rows(0, 2, 5), np.array([0, 2, 5], np.int32), arrays)


@pytest.mark.parametrize("has_logprobs", rest_is_slow([True], [False, True]))
@pytest.mark.parametrize("has_penalties", [False, True])
def test_words_are_barred_in_place_and_in_copies(device, generator, has_logprobs, has_penalties) -> None:
    both = Both(device)
    logits = torch.randn(len(SEEDS), VOCAB, generator=generator, device=device) * 2
    first, second, third = logits.topk(3, dim=1).indices.T.tolist()
    for row in (0, 2, 5):
        logits[row, [first[row], second[row], third[row]]] = torch.tensor([60.0, 50.0, 40.0], device=device)
    plan = make_plan(
        has_logprobs=has_logprobs,
        words=make_words(first, second),
        penalties=make_penalties() if has_penalties else None,
    )
    plain = Both(device).single(logits.clone(), None, make_plan(), None).ids.tolist()
    for sampled in both.sample(logits, plan):
        ids = sampled.ids.tolist()
        assert [ids[row] for row in (0, 2, 5)] == [second[row] for row in (0, 2, 5)]
        assert [ids[row] for row in (1, 3)] == [plain[row] for row in (1, 3)]
        if sampled.logprobs is not None:
            own = torch.log_softmax(logits, dim=1)[[0, 2, 5], [second[row] for row in (0, 2, 5)]]
            torch.testing.assert_close(sampled.logprobs[[0, 2, 5]], own, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("has_logprobs", [False, True])
def test_rows_of_every_kind_side_by_side_get_the_tokens_and_logprobs_of_one_gpu(
    device, generator, has_logprobs
) -> None:
    both = Both(device)
    top = {"top": rows(1, 5), "top_counts": np.array([2, 4], np.int32), "top_width": 4} if has_logprobs else {}
    plans = [
        make_plan(has_logprobs=has_logprobs),
        make_plan(has_logprobs=has_logprobs, filtered=rows(1, 3), **top),
        make_plan(has_logprobs=has_logprobs, penalties=make_penalties(), edits=make_edits(), filtered=rows(3), **top),
    ]
    for plan in plans:
        logits = torch.randn(len(SEEDS), VOCAB, generator=generator, device=device) * 2
        one, ours = both.sample(logits, plan)
        assert torch.equal(ours.ids, one.ids)
        assert (ours.logprobs is None) == (one.logprobs is None) == (not has_logprobs)
        if one.logprobs is not None and ours.logprobs is not None:
            torch.testing.assert_close(ours.logprobs, one.logprobs, atol=1e-5, rtol=1e-5)
        if plan.top.size and one.top_tokens is not None and one.top_logprobs is not None:
            assert ours.top_tokens is not None
            assert torch.equal(ours.top_tokens, one.top_tokens)
            torch.testing.assert_close(ours.top_logprobs, one.top_logprobs, atol=1e-5, rtol=1e-5)
        assert torch.equal(both.slots[0]["num_sampled"], both.slots[1]["num_sampled"])
        assert torch.equal(both.slots[0].last_token, both.slots[1].last_token)


def test_ids_that_say_so_end_the_engine_with_the_check_words_of_both_ranks(device) -> None:
    both = Both(device)
    both.sharded.check(np.array([0, -1, 5], np.int32))
    both.links.candidates.disagreement.copy_(torch.tensor([1, 17, 18]))
    with pytest.raises(RanksDisagreeError, match="rank 0 sampled with check word 17, another rank with 18"):
        both.sharded.check(np.array([0, -2], np.int32))
