"""Logprobs of prompts are those of transformers, however a prompt is cut, and whatever runs beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toka_engine.messages import Tokens
from toka_engine.model.prompt_scores import find_top, score_logits, score_prompt
from toka_engine.model.ranks import Ranks

from tests.model.driving import Driver, ints, load
from tests.model.thread_ranks import run_ranks

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 5, 6, 5, 12], [9, 8], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3]]


@pytest.fixture
def tiny(drive_tiny: Callable[..., tuple[Any, Driver]]) -> tuple[Any, Driver]:
    """The model of transformers, and a driver of ours."""
    return drive_tiny(initializer_range=0.2)


def own_logprobs(model: Any, prompt: list[int]) -> torch.Tensor:
    """[len(prompt) - 1, vocab] by transformers."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt])).logits[0, :-1].double()
    return torch.log_softmax(logits, dim=1)


def score_in_chunks(driver: Driver, prompt: list[int], sizes: list[int], num_tops: int) -> list[Tokens]:
    """Prefill `prompt` in slot 0 in chunks of these sizes, beside a decode row of slot 1."""
    driver.reset()
    setup = driver.add_slots([0, 1])
    driver.prefill({1: [4, 4, 4]}, **setup)
    found, begin = [], 0
    for size in sizes:
        end = begin + size
        is_last = end == len(prompt)
        pages = driver.grow({0: end, 1: driver.lengths[1] + 1})
        tokens = driver.run(
            **pages,
            decode_slots=ints(1),
            prefill_slots=ints(0),
            prefill_starts=ints(begin),
            prefill_lengths=ints(size),
            prefill_tokens=ints(*prompt[begin:end]),
            fanout_slots=ints(0) if is_last else ints(),
            fanout_chunks=ints(0) if is_last else ints(),
            scored_chunks=ints(0),
            scored_next=ints(-1 if is_last else prompt[end]),
            scored_counts=ints(num_tops),
        )
        driver.lengths[1] += 1
        driver.lengths[0] = begin = end
        found.append(tokens)
    return found


@pytest.mark.parametrize("sizes", [[18], [1, 16, 1], [5, 5, 8]], ids=str)
@pytest.mark.parametrize("num_tops", [0, 3])
def test_each_token_has_the_logprob_of_transformers_however_the_prompt_is_cut(
    tiny: tuple[Any, Driver], sizes: list[int], num_tops: int
) -> None:
    model, driver = tiny
    prompt = PROMPTS[3]
    own = own_logprobs(model, prompt)
    steps = score_in_chunks(driver, prompt, sizes, num_tops)
    logprobs = np.concatenate([step.scored_logprobs for step in steps])
    ranks = np.concatenate([step.scored_ranks for step in steps])
    expected = own.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert np.allclose(logprobs, expected, atol=1e-4)
    assert ranks.tolist() == ((own > expected[:, None]).sum(dim=1) + 1).tolist()
    tops = np.concatenate([step.scored_top_tokens for step in steps]).reshape(len(prompt) - 1, num_tops)
    assert tops.tolist() == own.topk(num_tops, dim=1).indices.tolist()
    values = np.concatenate([step.scored_top_logprobs for step in steps]).reshape(len(prompt) - 1, num_tops)
    assert np.allclose(values, own.topk(num_tops, dim=1).values, atol=1e-4)


def test_several_prompts_of_one_step_are_scored_as_each_alone(tiny: tuple[Any, Driver]) -> None:
    model, driver = tiny
    setup = driver.add_slots([0, 1, 2, 3], num_logprobs=0)
    pages = driver.grow({slot: len(prompt) for slot, prompt in enumerate(PROMPTS)})
    tokens = driver.run(
        **setup,
        **pages,
        prefill_slots=ints(0, 1, 2, 3),
        prefill_starts=ints(0, 0, 0, 0),
        prefill_lengths=ints(*map(len, PROMPTS)),
        prefill_tokens=ints(*(token for prompt in PROMPTS for token in prompt)),
        fanout_slots=ints(0, 1, 2, 3),
        fanout_chunks=ints(0, 1, 2, 3),
        scored_chunks=ints(0, 1, 3),
        scored_next=ints(-1, -1, -1),
        scored_counts=ints(2, 0, 1),
    )
    expected = torch.cat(
        [own_logprobs(model, PROMPTS[at]).gather(1, torch.tensor(PROMPTS[at][1:])[:, None])[:, 0] for at in (0, 1, 3)]
    )
    assert np.allclose(tokens.scored_logprobs, expected, atol=1e-4)
    assert tokens.ids.size == tokens.logprobs.size == 4
    is_beyond = (tokens.scored_top_tokens.reshape(-1, 2) < 0).sum(axis=1)
    assert is_beyond.tolist() == [0] * 10 + [2] + [1] * 17


def test_a_token_that_is_the_likeliest_has_the_very_logprob_of_the_first_of_the_tops(tiny: tuple[Any, Driver]) -> None:
    """Evaluations compare the two for equality to see whether a continuation is the greedy one."""
    _, driver = tiny
    prompt = PROMPTS[0] + driver.generate([PROMPTS[0]], 20)[0]
    (step,) = score_in_chunks(driver, prompt, [len(prompt)], 1)
    is_greedy = np.arange(1, len(prompt)) >= len(PROMPTS[0])
    assert (step.scored_ranks[is_greedy] == 1).all()
    assert (step.scored_logprobs[is_greedy] == step.scored_top_logprobs[is_greedy]).all()


def test_pieces_change_nothing() -> None:
    random = torch.Generator().manual_seed(2)
    weight, hidden = torch.randn(300, 16, generator=random), torch.randn(70, 16, generator=random)
    targets, counts = torch.arange(70, dtype=torch.int32) * 4, torch.full((70,), 5, dtype=torch.int32)

    def score(piece_rows: int) -> Any:
        return score_prompt(lambda part: part @ weight.T, hidden, targets, counts, 5, piece_rows=piece_rows)

    whole = score(128)
    for piece_rows in (1, 32, 70):
        for found, expected in zip(score(piece_rows), whole, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("count", [0, 4, 120])
def test_ranks_that_share_the_vocabulary_find_what_one_does(size: int, count: int) -> None:
    from toka_engine.model.cpu.vocabulary import ShardedVocabulary
    from toka_engine.model.sharding import Sharding

    logits, ids = torch.randn(50, 300, generator=torch.Generator().manual_seed(3)), torch.arange(50) * 6
    whole = score_logits(logits, ids, count)

    def work(ranks: Ranks) -> Any:
        part = logits[:, slice(*Sharding(ranks.rank, size).split_vocabulary(300))].contiguous()
        return score_logits(part, ids, count, ShardedVocabulary(ranks, 300))

    for found in run_ranks(size, work):
        torch.testing.assert_close(found.logprobs, whole.logprobs)
        assert torch.equal(found.ranks, whole.ranks)
        assert torch.equal(found.top_tokens, whole.top_tokens)
        torch.testing.assert_close(found.top_logprobs, whole.top_logprobs)


def test_two_ranks_of_a_model_score_a_prompt_as_one(make_tiny: Callable[..., tuple[Any, Path]]) -> None:
    _, folder = make_tiny()

    def work(ranks: Ranks | None) -> Tokens:
        driver = Driver(load(folder, ranks))
        return score_in_chunks(driver, PROMPTS[3], [7, 11], 2)[1]

    whole = work(None)
    for found in run_ranks(2, work):
        assert np.allclose(found.scored_logprobs, whole.scored_logprobs, atol=1e-5)
        assert found.scored_top_tokens.tolist() == whole.scored_top_tokens.tolist()


@pytest.mark.parametrize("width", [200, 2048, 5000, 49_153])
@pytest.mark.parametrize("count", [0, 1, 20])
def test_the_likeliest_are_found_by_blocks(width: int, count: int) -> None:
    x = torch.randn(7, width, generator=torch.Generator().manual_seed(5))
    x[0, :count] += 10  # all in one block
    values, columns = find_top(x, count)
    expected = torch.topk(x, count, dim=1)
    assert torch.equal(values, expected.values)
    assert torch.equal(columns, expected.indices)
