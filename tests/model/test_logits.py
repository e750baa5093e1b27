"""Logits equal transformers' to 1e-4 in fp32, for every RoPE type, bias, head and tying variant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from toka_engine.slot_parameters import SlotBatch

from tests.model.driving import Driver

TOLERANCE = 1e-4
IDS = [int(token) for token in torch.randint(3, 256, (120,), generator=torch.Generator().manual_seed(1))]

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "theta": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 32,
    },
    "yarn_all": {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "truncate": False,
    },
    "yarn_attention_factor": {
        "rope_type": "yarn",
        "factor": 2.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.25,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.5 * i for i in range(8)],
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 48,
    },
}


@torch.no_grad()
def reference_logits(model: Any, ids: list[int], prompt_len: int) -> torch.Tensor:
    """[len(ids), vocab]: the prompt at once, then one token at a time, as generation does."""
    out = model(torch.tensor([ids[:prompt_len]]), use_cache=True)
    parts = [out.logits[0]]
    for token in ids[prompt_len:]:
        out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
        parts.append(out.logits[0])
    return torch.cat(parts)


def prefill_logits(driver: Driver, ids: list[int], lengths: list[int]) -> torch.Tensor:
    """[len(lengths), vocab]: one step that prefills a slot with each of the first `lengths` tokens."""
    driver.reset()
    driver.prefill({slot: ids[:length] for slot, length in enumerate(lengths)})
    return driver.logits


def decode_logits(driver: Driver, ids: list[int], prompt_len: int) -> torch.Tensor:
    """[len(ids) - prompt_len, vocab]: prefill, then one decode step per further token, which is forced."""
    driver.reset()
    driver.prefill({0: ids[:prompt_len]})
    parts = []
    for token in ids[prompt_len:]:
        driver.worker.runner.state.last_tokens[0] = token
        driver.decode([0])
        parts.append(driver.logits)
    return torch.cat(parts)


def check_parity(model: Any, driver: Driver, prompt_len: int = 40, total: int = 60) -> None:
    expected = reference_logits(model, IDS[:total], prompt_len)
    lengths = [length for length in (1, 2, 7, 16, 17, 33, 40) if length <= prompt_len]
    got = prefill_logits(driver, IDS, lengths)
    assert (got - expected[[length - 1 for length in lengths]]).abs().max() <= TOLERANCE
    got = decode_logits(driver, IDS[:total], prompt_len)
    assert (got - expected[prompt_len:]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", list(ROPES))
def test_every_rope_type_gives_the_reference_logits(name: str, drive_tiny: Callable[..., tuple[Any, Driver]]) -> None:
    # dynamic scales from max_position_embeddings: 48 puts the last decode steps beyond it
    positions = 48 if name == "dynamic" else 128
    model, driver = drive_tiny(rope_parameters=dict(ROPES[name]), max_position_embeddings=positions)
    check_parity(model, driver)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention bias": ("Llama", {"attention_bias": True}),
    "mlp bias": ("Llama", {"mlp_bias": True}),
    "both biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "tied embeddings": ("Llama", {"tie_word_embeddings": True}),
    "one kv head": ("Llama", {"num_key_value_heads": 1}),
    "as many kv heads as heads": ("Llama", {"num_key_value_heads": 4}),
    "group of three": ("Llama", {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}),
    "wide heads": ("Llama", {"head_dim": 32}),
    "odd vocabulary": ("Llama", {"vocab_size": 261}),
    "qwen2": ("Qwen2", {}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3 with bias": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
}


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_model_variant_gives_the_reference_logits(
    name: str, drive_tiny: Callable[..., tuple[Any, Driver]]
) -> None:
    family, overrides = VARIANTS[name]
    model, driver = drive_tiny(family, **overrides)
    check_parity(model, driver)


@pytest.mark.parametrize("page_size", [1, 5, 64])
def test_any_page_size_gives_the_reference_logits(
    page_size: int, drive_tiny: Callable[..., tuple[Any, Driver]]
) -> None:
    model, driver = drive_tiny(settings={"page_size": page_size})
    check_parity(model, driver)


def test_a_prompt_cut_into_chunks_gives_the_same_logits(
    drive_tiny: Callable[..., tuple[Any, Driver]],
) -> None:
    model, driver = drive_tiny()
    expected = reference_logits(model, IDS[:100], 100)
    position = 0
    for length in (1, 30, 2, 16, 51):
        driver.prefill({0: IDS[position : position + length]}, **({} if position == 0 else {"new": SlotBatch()}))
        position += length
        assert (driver.logits[0] - expected[position - 1]).abs().max() <= TOLERANCE


NONE = torch.empty(0, dtype=torch.int32).numpy()
