"""Penalties on the GPU: each token is that of the definition over the very logits that the sampler was given.

No tolerance: what is done to the logits is fp32 on both sides. In graphs and without, with two steps in
flight, beside rows that do not ask.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu.test_parity import TINY, drive
from tests.model.driving import Driver
from tests.model.penalized import (
    follow_a_mixed_batch,
    follow_a_preempted_sequence,
    follow_choices_of_one_prompt,
)

PROMPT = [5, 6, 7, 8, 9, 10, 11, 5, 6, 5, 12, 13, 14, 15, 16, 17, 18, 19, 20, 5, 21]


@pytest.fixture(scope="module", params=[True, False], ids=["graphs", "eager"])
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Driver:
    """A model of tied embeddings likes to repeat itself: a token that counts one step late shows at once."""
    import transformers

    torch.manual_seed(7)
    config = transformers.LlamaConfig(**{**TINY, "tie_word_embeddings": True, "initializer_range": 0.03})
    folder: Path = tmp_path_factory.mktemp("tied")
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return drive(folder, use_cudagraphs=request.param, kv_cache_num_tokens=65536)


def test_each_token_is_that_of_the_definition(driver: Driver) -> None:
    assert follow_a_mixed_batch(driver, [PROMPT, PROMPT[:3], PROMPT[2:19]], 41).num_changed > 20


def test_a_step_of_more_samples_than_there_is_room_for_goes_in_parts(driver: Driver) -> None:
    from toka_engine.model.kernels.logit_penalties import PenaltyWorkspace

    sampler = driver._sample
    whole = sampler._penalty_work
    sampler._penalty_work = PenaltyWorkspace.allocate(2, TINY["vocab_size"], whole.logits.device)
    try:
        assert follow_a_mixed_batch(driver, [PROMPT, PROMPT[:3]], 21).num_changed > 10
    finally:
        sampler._penalty_work = whole


def test_choices_of_one_prompt_see_its_tokens_before_and_after_the_copy_of_its_last_page(driver: Driver) -> None:
    assert follow_choices_of_one_prompt(driver, PROMPT, 30).num_changed > 15


def test_a_preempted_sequence_finds_its_tokens_in_the_pages(driver: Driver) -> None:
    undisturbed, again = follow_a_preempted_sequence(driver, PROMPT, 40)
    assert undisturbed.num_changed > 10
    assert len(again.outputs[1]) == 40
