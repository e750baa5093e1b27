"""Edits of logits follow their definition token by token: bias, allowed tokens, tokens barred at first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from toka_engine.messages import Step
from toka_engine.model.cpu.sampler import CpuSampler
from toka_engine.model.cpu.vocabulary import ShardedVocabulary
from toka_engine.model.ranks import Ranks
from toka_engine.model.sample_plan import plan_sampling
from toka_engine.model.sharding import Sharding
from toka_engine.model.slot_state import HostSlots
from toka_engine.slot_parameters import SlotBatch

from tests.model.driving import Driver, ints
from tests.model.edited import edit, make_edits, slot_edits
from tests.model.following_edits import CASES, follow_edited_choices, follow_edits
from tests.model.penalized import Asked, Follower
from tests.model.test_sampler import check_frequencies, expected_probabilities, make_logits, read_nothing
from tests.model.thread_ranks import run_ranks

PROMPT = [5, 6, 7, 8, 9, 10, 11, 5, 6, 5, 12, 13, 14, 15, 16, 17, 18, 19, 20, 5, 21]
NUM_DRAWS = 8_000


@pytest.fixture
def driver(drive_tiny: Callable[..., tuple[Any, Driver]]) -> Driver:
    return drive_tiny(tie_word_embeddings=True, initializer_range=0.05)[1]


@pytest.mark.parametrize("num_logprobs", [-1, 0, 3])
def test_each_token_is_that_of_the_definition_whatever_stands_beside_it(driver: Driver, num_logprobs: int) -> None:
    follower = follow_edits(driver, [PROMPT, PROMPT[:3], PROMPT[2:19]], 12, num_logprobs)
    assert follower.num_changed > 20


def test_choices_of_one_prompt_are_edited_alike(driver: Driver) -> None:
    assert follow_edited_choices(driver, PROMPT[:16], 8).num_changed > 0


def test_a_sequence_that_was_preempted_counts_the_tokens_that_it_had(driver: Driver) -> None:
    asked = Asked(edits=make_edits({7: 2.0}, ends=[5, 8, 11], min_tokens=6))
    follower = Follower(driver)
    follower.begin(1, PROMPT, asked, [9, 9, 9, 9])
    setup = driver.add_slots([1], num_sampled=4) | {"edits": slot_edits({1: asked.edits})}
    follower.prefill(1, [*PROMPT, 9, 9, 9, 9], **setup)
    follower.decode([1], 6)


def test_words_count_the_tokens_before_a_preemption_and_none_of_the_prompt(driver: Driver) -> None:
    """Those that stand in the prompt are no part of a word; those that the sequence had before are."""
    asked = Asked(edits=make_edits(words=[[token, other] for token in (9, 21) for other in range(0, 60, 2)]))
    follower = Follower(driver)
    follower.begin(1, PROMPT, asked, [30, 31, 9])
    setup = driver.add_slots([1], num_sampled=3) | {"edits": slot_edits({1: asked.edits})}
    follower.prefill(1, [*PROMPT, 30, 31, 9], **setup)
    follower.decode([1], 6)
    driver.reset()
    follower.begin(1, PROMPT, asked)
    follower.prefill(1, PROMPT, **driver.add_slots([1]), edits=slot_edits({1: asked.edits}))
    follower.decode([1], 6)


def test_slots_that_change_hands_have_the_words_of_their_owner_alone(driver: Driver) -> None:
    follower = Follower(driver)
    no_pairs, no_repeats = CASES["words"].edits, make_edits(words=[[token, token] for token in range(64)])
    for slot, edits in ((0, no_pairs), (1, no_repeats), (2, no_pairs)):
        follower.begin(slot, PROMPT[slot:], Asked(edits=edits))
        follower.prefill(slot, PROMPT[slot:], **driver.add_slots([slot]), edits=slot_edits({slot: edits}))
    follower.decode([0, 1, 2], 4)
    for slot in (0, 1):
        follower.begin(slot, PROMPT[3:], Asked(edits=no_repeats if slot == 0 else None))
        setup = driver.add_slots([slot]) | {"edits": slot_edits({slot: follower.asked[slot].edits})}
        follower.prefill(slot, PROMPT[3:], **setup)
    follower.decode([2, 0, 1], 8)
    assert follower.num_changed > 0


def test_a_slot_whose_next_owner_asks_for_nothing_is_not_edited(driver: Driver) -> None:
    expected = driver.generate([PROMPT], 8)[0]
    driver.reset()
    setup = driver.add_slots([0]) | {"edits": slot_edits({0: make_edits(allowed=[3])})}
    assert driver.prefill({0: PROMPT}, **setup).ids.tolist() == [3]
    driver.reset()
    assert driver.generate([PROMPT], 8)[0] == expected


@pytest.mark.parametrize("parameters", [{}, {"top_k": 12, "temperature": 0.8}, {"top_p": 0.7}, {"min_p": 0.05}])
@pytest.mark.parametrize("has_seeds", [False, True])
def test_draws_follow_the_edited_distribution(parameters: dict[str, float], has_seeds: bool) -> None:
    logits, edits = make_logits(), make_edits({7: 2.0, 8: -50.0}, allowed=[*range(5, 60)], ends=[9], min_tokens=1)
    state = HostSlots(NUM_DRAWS)
    slots = np.arange(NUM_DRAWS, dtype=np.int32)
    new = SlotBatch.of(slots, seed=slots if has_seeds else -1, **parameters)
    state.set_up(Step(number=1, new=new, edits=slot_edits(dict.fromkeys(slots.tolist(), edits))))
    plan = plan_sampling(Step(number=2, decode_slots=slots), state)
    rows = torch.zeros(NUM_DRAWS, dtype=torch.int64)
    ids = CpuSampler(0, read_nothing, read_nothing)(logits[None, :], rows, plan, state).ids.numpy()
    check_frequencies(ids, expected_probabilities(edit(logits.clone(), edits, []), **parameters))


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_share_the_vocabulary_edit_it_as_one_does(size: int) -> None:
    count, vocab = 200, 300
    logits = torch.randn(count, vocab, generator=torch.Generator().manual_seed(8))
    slots = np.arange(count, dtype=np.int32)
    edits = [
        make_edits({int(slot): 5.0, 299: -3.0, 150: float("-inf")}, [*range(slot % 7, 300, 7)], [slot % 100], slot % 2)
        for slot in slots
    ]
    new = SlotBatch.of(slots, seed=slots, temperature=slots % 3 / 2, top_k=slots % 5, repetition_penalty=1.3)

    def sample(ranks: Ranks | None) -> list[int]:
        state = HostSlots(count)
        state.set_up(Step(number=1, new=new, edits=slot_edits(dict(enumerate(edits)))))
        vocabulary = ShardedVocabulary(ranks, vocab) if ranks else None
        part = logits[:, slice(*Sharding(ranks.rank, ranks.size).split_vocabulary(vocab))] if ranks else logits

        def read(sources: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            return np.concatenate([np.arange(source, source + 1) for source in sources.tolist()])

        plan = plan_sampling(Step(number=2, decode_slots=slots), state)
        sampled = CpuSampler(0, read, read_nothing, vocabulary)(part, None, plan, state)
        return sampled.ids.tolist()

    assert run_ranks(size, sample) == [sample(None)] * size


def test_where_no_token_is_left_nothing_is_sampled() -> None:
    state = HostSlots(2)
    edits = make_edits({3: float("-inf")}, allowed=[3])
    state.set_up(Step(number=1, new=SlotBatch.of([0, 1]), edits=slot_edits({1: edits})))
    plan = plan_sampling(Step(number=2, decode_slots=ints(0, 1)), state)
    ids = CpuSampler(0, read_nothing, read_nothing)(torch.zeros(2, 10), None, plan, state).ids.tolist()
    assert ids[0] >= 0
    assert ids[1] == -1


def test_a_row_that_may_end_by_now_takes_the_plain_way_again() -> None:
    state = HostSlots(1)
    edits = make_edits(ends=[3], min_tokens=2)
    step = Step(number=2, decode_slots=ints(0))
    state.set_up(Step(number=1, new=SlotBatch.of([0]), edits=slot_edits({0: edits})))
    plans = []
    for _ in range(3):
        plans.append(plan_sampling(step, state))
        state.advance(step)
    assert [plan.is_plain for plan in plans] == [False, False, True]
