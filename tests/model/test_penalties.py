"""Penalties follow their definition token by token, wherever a sequence's tokens come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from toka_engine.model.cpu.penalties import apply_penalties
from toka_engine.model.sample_plan import Penalties

from tests.model.driving import Driver, ints
from tests.model.penalized import (
    CASES,
    PLAIN,
    Asked,
    follow_a_mixed_batch,
    follow_a_preempted_sequence,
    follow_choices_of_one_prompt,
    penalize,
    sampling_of,
)
from tests.model.test_sampler import check_frequencies

PROMPT = [5, 6, 7, 8, 9, 10, 11, 5, 6, 5, 12, 13, 14, 15, 16, 17, 18, 19, 20, 5, 21]


@pytest.fixture
def driver(drive_tiny: Callable[..., tuple[Any, Driver]]) -> Driver:
    """A model of tied embeddings likes to repeat itself: a token that counts one step late shows at once."""
    return drive_tiny(tie_word_embeddings=True, initializer_range=0.05)[1]


@pytest.mark.parametrize("name", CASES)
def test_changed_logits_are_those_of_the_definition(name: str) -> None:
    asked = CASES[name]
    random = np.random.default_rng(1)
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)) * 4
    sequences = [(random.integers(0, 50, 9), random.integers(0, 20, count)) for count in (0, 1, 40)]
    tokens = np.concatenate([part for pair in sequences for part in pair])
    penalties = Penalties(
        rows=np.arange(3),
        sources=ints(0, 1, 2),
        lengths=ints(*(prompt.size + output.size for prompt, output in sequences)),
        num_generated=ints(*(output.size for _, output in sequences)),
        presence=np.full(3, asked.presence, np.float32),
        frequency=np.full(3, asked.frequency, np.float32),
        repetition=np.full(3, asked.repetition, np.float32),
    )
    expected = [
        penalize(row, prompt.tolist(), output.tolist(), asked)
        for row, (prompt, output) in zip(logits, sequences, strict=True)
    ]
    apply_penalties(logits, tokens, penalties)
    torch.testing.assert_close(logits, torch.stack(expected), atol=1e-6, rtol=1e-6)


def test_the_definition_of_repetition_is_that_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(2)) * 4
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[3, 3, 9, 20, 41]]), logits)
    torch.testing.assert_close(penalize(logits[0], [3, 3, 9], [20, 41], Asked(repetition=1.3)), theirs[0])


def test_each_token_is_that_of_the_definition_and_rows_without_penalties_are_left_alone(driver: Driver) -> None:
    prompts = [PROMPT, PROMPT[:3], PROMPT[2:19]]
    follower = follow_a_mixed_batch(driver, prompts, 41)
    assert follower.num_changed > 60
    slot = list(CASES).index("plain")
    driver.reset()
    assert driver.generate([prompts[slot % 3]], 41)[0] == follower.outputs[slot]


def test_choices_of_one_prompt_see_its_tokens_before_and_after_the_copy_of_its_last_page(driver: Driver) -> None:
    favourites = driver.generate([PROMPT], 8, frequency_penalty=2.0)[0]
    assert follow_choices_of_one_prompt(driver, PROMPT + favourites, 30).num_changed > 60


def test_a_preempted_sequence_goes_on_as_if_nothing_had_happened(driver: Driver) -> None:
    undisturbed, again = follow_a_preempted_sequence(driver, PROMPT, 40)
    assert undisturbed.num_changed > 30
    assert again.outputs[1] == undisturbed.outputs[0]


def test_a_slot_whose_next_owner_asks_for_nothing_is_not_penalized(driver: Driver) -> None:
    expected = driver.generate([PROMPT], 10)[0]
    driver.reset()
    penalized = driver.generate([PROMPT], 10, **sampling_of([CASES["all"]]))[0]
    assert penalized != expected
    driver.reset()
    assert driver.generate([PROMPT], 10, **sampling_of([PLAIN]))[0] == expected


def test_logprobs_are_of_the_models_own_distribution(driver: Driver) -> None:
    setup = driver.add_slots([0], num_logprobs=3, **sampling_of([CASES["all"]]))
    driver.prefill({0: PROMPT}, **setup)
    for _ in range(8):
        tokens = driver.decode([0])
        own = torch.log_softmax(driver.logits[0].double(), dim=0)
        assert tokens.logprobs[0] == pytest.approx(float(own[int(tokens.ids[0])]), abs=1e-5)
        assert tokens.top_tokens.tolist() == own.topk(3).indices.tolist()


@pytest.mark.parametrize("seed", [None, 1])
def test_draws_follow_the_changed_distribution(driver: Driver, seed: int | None) -> None:
    """Many choices of one prompt, with top_k: penalties come before the filters."""
    count = 250
    asked = Asked(repetition=1.8)
    seeds = -1 if seed is None else np.arange(count) + 1000
    ids: list[int] = []
    for repeat in range(4):
        driver.reset()
        setup = driver.add_slots(
            list(range(count)),
            temperature=0.9,
            top_k=12,
            seed=seeds if seed is None else seeds + repeat * count,
            **sampling_of([asked] * count),
        )
        ids += driver.prefill({0: PROMPT}, fanout={0: list(range(count))}, **setup).ids.tolist()
    changed = penalize(driver.logits[0], PROMPT, [], asked).double() / 0.9
    kept = changed.topk(12)
    p = torch.zeros(256, dtype=torch.float64).index_put((kept.indices,), kept.values.softmax(0))
    check_frequencies(np.array(ids), p.numpy())
