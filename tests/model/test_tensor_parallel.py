"""Ranks that hold a model together say what one rank says: logits, tokens, logprobs, for every sampling parameter.

The ranks are threads here; over processes see test_gloo_ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toka_engine.errors import ConfigError
from toka_engine.messages import Tokens
from toka_engine.model.ranks import Ranks

from tests.model.driving import Driver, ints, load
from tests.model.test_logits import IDS, TOLERANCE
from tests.model.thread_ranks import run_ranks

MakeTiny = Callable[..., tuple[Any, Path]]
PROMPTS = {0: IDS[:33], 1: IDS[4:9], 2: IDS[:1], 3: IDS[7:40], 4: IDS[2:20], 5: IDS[1:18], 6: IDS[9:30]}
SAMPLING: dict[str, list[float]] = {  # by slot; 7 and 8 are further choices of prompt 6
    "temperature": [0, 0.8, 1.0, 1.2, 0, 0.7, 1.0, 1.0, 1.0],
    "seed": [-1, 5, 6, 7, -1, 9, 10, 11, 12],
    "top_k": [0, 0, 5, 0, 0, 40, 0, 0, 0],
    "top_p": [1, 1, 1, 0.7, 1, 0.9, 1, 1, 1],
    "min_p": [0, 0, 0, 0, 0, 0.01, 0.05, 0, 0],
    "presence_penalty": [0, 0, 0, 0, 0.5, 0, 0, 0, 0],
    "frequency_penalty": [0, 0.3, 0, 0, 0.2, 0, 0, 0, 0],
    "repetition_penalty": [1, 1.2, 1, 1, 1.3, 1.1, 1, 1, 1],
    "num_logprobs": [20, -1, 0, 2, 1, 3, -1, 5, 20],
}
NUM_STEPS = 6


def play(driver: Driver) -> tuple[list[torch.Tensor], list[Tokens]]:
    """All parameters side by side: one step of prompts, several of decode rows, one of both with a shared prefix."""
    logits, tokens = [], []

    def note(result: Tokens) -> None:
        tokens.append(result)
        logits.append(driver.logits)

    new = driver.add_slots(list(range(9)), **SAMPLING)
    note(driver.prefill(PROMPTS, fanout={**{slot: [slot] for slot in range(6)}, 6: [6, 7, 8]}, **new))
    for slot in (7, 8):
        driver.pages[slot], driver.lengths[slot] = list(driver.pages[6]), driver.lengths[6]
        driver.run(append_slots=ints(slot, slot), append_indices=ints(0, 1), append_pages=ints(*driver.pages[6]))
    for _ in range(NUM_STEPS):
        note(driver.decode(list(range(7))))
    groups = {"first_rows": 0, "num_rows": 2, "first_columns": 0, "num_columns": 1}
    note(driver.decode([7, 8], **{f"group_{name}": ints(value) for name, value in groups.items()}))
    return logits, tokens


def play_on(folder: Path, size: int, **settings: Any) -> list[tuple[list[torch.Tensor], list[Tokens]]]:
    return run_ranks(size, lambda ranks: play(Driver(load(folder, ranks, **settings))))


def check_equal(ours: Tokens, theirs: Tokens) -> None:
    assert np.array_equal(ours.ids, theirs.ids)
    assert np.array_equal(ours.top_rows, theirs.top_rows)
    assert np.array_equal(ours.top_tokens, theirs.top_tokens)
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=TOLERANCE)
    np.testing.assert_allclose(ours.top_logprobs, theirs.top_logprobs, atol=TOLERANCE)


@pytest.mark.parametrize("size", [2, 4])  # with two KV heads, of 4 ranks two hold the same one
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Llama", {"tie_word_embeddings": True, "vocab_size": 261}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 32}),
    ],
)
def test_ranks_give_the_logits_and_the_tokens_of_one(
    size: int, family: str, overrides: dict[str, Any], make_tiny: MakeTiny
) -> None:
    _, folder = make_tiny(family, **overrides)
    [(expected_logits, expected)] = play_on(folder, 1)
    every = play_on(folder, size)
    for step, whole in enumerate(expected_logits):
        joined = torch.cat([logits[step] for logits, _ in every], dim=1)
        assert (joined - whole).abs().max() <= TOLERANCE
        for _, tokens in every:
            check_equal(tokens[step], expected[step])


PAGES_AND_HYDRAGEN: list[dict[str, Any]] = [{"page_size": 1}, {"use_hydragen": False, "page_size": 64}]


def generate_three(driver: Driver) -> list[list[int]]:
    """Return the tokens of a greedy and two seeded sequences."""
    sampling = {"temperature": [0, 1, 1], "seed": [-1, 3, 4], "top_k": [0, 0, 7]}
    return driver.generate([IDS[:33], IDS[4:9], IDS[:1]], 8, **sampling)


@pytest.mark.parametrize("settings", PAGES_AND_HYDRAGEN)
def test_the_size_of_pages_and_hydragen_change_nothing(make_tiny: MakeTiny, settings: dict[str, Any]) -> None:
    _, folder = make_tiny()

    def generate(ranks: Ranks) -> list[list[int]]:
        return generate_three(Driver(load(folder, ranks, **settings)))

    [expected] = run_ranks(1, generate)
    assert run_ranks(2, generate) == [expected, expected]


def test_rows_without_a_seed_are_the_same_on_all_ranks(make_tiny: MakeTiny) -> None:
    _, folder = make_tiny()

    def generate(ranks: Ranks) -> list[list[int]]:
        driver = Driver(load(folder, ranks, seed=3))
        return driver.generate([IDS[:9]] * 8, 12, temperature=1.5, top_k=[0, 0, 0, 0, 9, 9, 9, 9])

    first, *others = run_ranks(4, generate)
    assert all(other == first for other in others)
    assert len({tuple(ids) for ids in first}) == 8


def test_ranks_have_equal_sizes_although_one_has_less_memory(
    make_tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = make_tiny()
    left = iter([3 << 30, 2 << 30] * 10)
    for module in ("toka_engine.model.cpu.backend", "toka_engine.model.worker"):
        monkeypatch.setattr(f"{module}.read_available_bytes", lambda device: next(left))
    first, second = run_ranks(2, lambda ranks: load(folder, ranks, kv_cache_num_tokens=None).ready)
    assert first == second


@pytest.mark.parametrize(
    ("overrides", "size", "message"),
    [
        ({}, 3, "num_attention_heads=4 cannot be split over tp_size=3"),
        ({"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}, 2, "num_key_value_heads=3 cannot be"),
        ({"intermediate_size": 161}, 2, "intermediate_size=161 cannot be split over tp_size=2"),
        ({"vocab_size": 40}, 4, "vocab_size=40 cannot be split over tp_size=4"),
    ],
)
def test_a_model_that_cannot_be_split_is_refused_with_both_numbers_before_its_weights_are_read(
    overrides: dict[str, Any], size: int, message: str, make_tiny: MakeTiny
) -> None:
    _, folder = make_tiny(**overrides)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=message):
        run_ranks(size, lambda ranks: load(folder, ranks))
