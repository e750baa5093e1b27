"""Edits of logits and logprobs of prompts on the GPU: by their definition, over the very logits that the GPU computed.

In graphs and without, in place and in copies, beside rows that do not ask.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.gpu.test_parity import TINY, drive
from tests.model.driving import Driver, ints
from tests.model.following_edits import follow_edited_choices, follow_edits

PROMPT = [5, 6, 7, 8, 9, 10, 11, 5, 6, 5, 12, 13, 14, 15, 16, 17, 18, 19, 20, 5, 21]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    torch.manual_seed(7)
    config = transformers.LlamaConfig(**{**TINY, "tie_word_embeddings": True, "initializer_range": 0.03})
    folder = tmp_path_factory.mktemp("tied")
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["graphs", "eager"])
def driver(request: pytest.FixtureRequest, folder: Path) -> Driver:
    return drive(folder, use_cudagraphs=request.param, kv_cache_num_tokens=65536)


@pytest.mark.parametrize("num_logprobs", [-1, 0, 3])
def test_each_token_is_that_of_the_definition(driver: Driver, num_logprobs: int) -> None:
    assert follow_edits(driver, [PROMPT, PROMPT[:3], PROMPT[2:19]], 12, num_logprobs).num_changed > 10


def test_choices_of_one_prompt_are_edited_once(driver: Driver) -> None:
    assert follow_edited_choices(driver, PROMPT[:16], 8).num_changed > 0


@pytest.mark.parametrize("num_tops", [0, 5])
def test_logprobs_of_a_prompt_are_those_of_transformers(driver: Driver, folder: Path, num_tops: int) -> None:
    import transformers

    prompt = torch.randint(3, 1000, (400,), generator=torch.Generator().manual_seed(1)).tolist()
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda()
    with torch.inference_mode():
        own = torch.log_softmax(model(torch.tensor([prompt]).cuda()).logits[0, :-1].double(), dim=1).cpu()
    driver.reset()
    setup = driver.add_slots([0], num_logprobs=0)
    found = []
    for begin, end in ((0, 170), (170, 400)):
        found.append(
            driver.run(
                **setup,
                **driver.grow({0: end}),
                prefill_slots=ints(0),
                prefill_starts=ints(begin),
                prefill_lengths=ints(end - begin),
                prefill_tokens=ints(*prompt[begin:end]),
                fanout_slots=ints(0) if end == 400 else ints(),
                fanout_chunks=ints(0) if end == 400 else ints(),
                scored_chunks=ints(0),
                scored_next=ints(-1 if end == 400 else prompt[end]),
                scored_counts=ints(num_tops),
            )
        )
        setup = {}
    logprobs = np.concatenate([step.scored_logprobs for step in found])
    expected = own.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].numpy()
    assert logprobs.size == 399
    assert np.abs(logprobs - expected).max() < 0.1
    assert np.abs(logprobs - expected).mean() < 0.01
    if num_tops:
        tops = np.concatenate([step.scored_top_logprobs for step in found]).reshape(399, num_tops)
        assert np.abs(tops - own.topk(num_tops, dim=1).values.numpy()).max() < 0.1
        ranks = np.concatenate([step.scored_ranks for step in found])
        is_best = ranks == 1
        assert (logprobs[is_best] == tops[is_best, 0]).all()


def test_a_greedy_token_has_the_very_logprob_of_the_first_of_the_tops(driver: Driver) -> None:
    driver.reset()
    driver.prefill({0: PROMPT, 1: PROMPT[:5]}, **driver.add_slots([0, 1], num_logprobs=[2, 1]))
    for _ in range(8):
        tokens = driver.decode([0, 1])
        tops = tokens.top_logprobs.reshape(2, -1)
        assert (tokens.logprobs == tops[:, 0]).all()
