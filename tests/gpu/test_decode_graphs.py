"""Decode steps of few rows, which are graphs as a whole: their tokens are those of the head and sampler outside.

That their logits are right is the matter of test_parity, where a sampler outside records them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.gpu.test_parity import drive, make, prompts_of
from tests.model.driving import Driver
from tests.unit.kernels.test_sampling_kernels import chi_square_is_plausible

NUM_TOKENS = 40


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    folder: Path = tmp_path_factory.mktemp("Llama")
    make("Llama", folder)
    return drive(folder, cudagraph_max_size=64)


def generate(driver: Driver, prompts: list[list[int]], **sampling: Any) -> list[list[int]]:
    driver.reset()
    return driver.generate(prompts, NUM_TOKENS, **sampling)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 40, 64])
def test_greedy_tokens_are_those_of_a_sampler_outside_the_graph(driver: Driver, count: int) -> None:
    prompts = prompts_of(count, 40)
    inside, outside = generate(driver, prompts), generate(driver, prompts, num_logprobs=0)
    assert inside == outside
    assert len({token for row in inside for token in row}) > 10


def test_padding_rows_change_nothing_for_the_others(driver: Driver) -> None:
    prompts = dict(enumerate(prompts_of(6, 40)))

    def decode(count: int) -> list[list[int]]:
        driver.reset()
        driver.prefill(prompts)
        return [driver.decode(list(range(count))).ids[:5].tolist() for _ in range(NUM_TOKENS)]

    assert decode(5) == decode(6)  # by one graph, of 6 rows


def test_steps_with_and_without_logprobs_follow_each_other(driver: Driver) -> None:
    """Both ways share last tokens, lengths and pages."""
    prompts = prompts_of(3, 40)
    plain = generate(driver, prompts)
    driver.reset()
    slots = [0, 1, 2]
    setup = driver.add_slots(slots)
    outputs: list[list[int]] = [[], [], []]
    tokens = driver.prefill(dict(enumerate(prompts)), **setup)
    for turn in range(NUM_TOKENS):
        for output, token in zip(outputs, tokens.ids.tolist(), strict=True):
            output.append(token)
        new: dict[str, Any] = {}
        if turn % 3 == 0:  # from here on with logprobs, or without
            lengths = [driver.lengths[slot] for slot in slots]
            new = driver.add_slots(slots, lengths, num_logprobs=0 if turn % 2 else -1)
        tokens = driver.decode(slots, **new)
        assert (tokens.logprobs.size > 0) == (turn // 3 % 2 == 1)
    assert outputs == plain


def test_draws_follow_the_softmax_and_differ_from_step_to_step(driver: Driver) -> None:
    temperature, slots, prompt = 0.7, list(range(40)), prompts_of(1, 40)[0]
    counts, logits = np.zeros(1000), torch.empty(0)
    for turn in range(61):
        driver.reset()
        driver.prefill(dict.fromkeys(slots, prompt), **driver.add_slots(slots))  # greedy: the same token for all
        new = driver.add_slots(slots, length=len(prompt), temperature=temperature, num_logprobs=0 if turn == 0 else -1)
        drawn = driver.decode(slots, **new).ids
        if turn == 0:  # once with a sampler outside, for the distribution
            logits = driver.logits[0]
        else:
            counts += np.bincount(drawn, minlength=counts.size)
    probabilities = torch.softmax(logits.double() / temperature, 0).cpu().numpy()
    assert chi_square_is_plausible(counts, probabilities)
