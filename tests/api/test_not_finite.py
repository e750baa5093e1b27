"""A row whose logits are not finite fails its own request with a 500 that says so; those beside it and after it do not
notice.

The weights are those of a tiny random model whose embedding of one token is NaN: a sequence breaks where it meets it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from tests.api.conftest import client_of, read_metrics, running_engine
from tests.api.test_leaving_early import wait_idle
from tests.engine_process import EngineProcess
from tests.model.conftest import TINY
from tests.model.driving import Driver, load

NUM_TOKENS = 12
HEALTHY = [[700 + 10 * index, 40 + index, 300] for index in range(6)]
BREAKS_LATER = [900, 901, 902]


@dataclass(frozen=True)
class Poisoned:
    """An engine, the token that breaks it, and what the sequences gave before it was poisoned."""

    engine: EngineProcess
    token: int
    healthy: list[list[int]]
    breaks_after: int
    """Tokens that BREAKS_LATER generates, the poisonous one included, before it fails."""


def make_weights(folder: Path) -> tuple[int, list[list[int]], int]:
    """Poison a token that BREAKS_LATER generates in its middle and no healthy sequence meets."""
    import transformers
    from safetensors.torch import load_file, save_file

    torch.manual_seed(7)
    config = transformers.LlamaConfig(**{**TINY, "vocab_size": 49152, "tie_word_embeddings": False})
    transformers.LlamaForCausalLM(config).float().save_pretrained(folder)
    outputs = Driver(load(folder)).generate([*HEALTHY, BREAKS_LATER], NUM_TOKENS)
    *healthy, broken = outputs
    met = {token for ids in [*HEALTHY, *healthy] for token in ids}
    index = next(i for i, token in enumerate(broken) if i >= 2 and token not in met and token not in broken[:i])
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][broken[index]] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    return broken[index], healthy, index + 1


@pytest.fixture(scope="module")
def poisoned(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Poisoned]:
    folder = tmp_path_factory.mktemp("poisoned")
    token, healthy, breaks_after = make_weights(folder / "model")
    # Few pages: those of broken sequences are soon given to others.
    settings = ("dtype=float32", "kv_cache_num_tokens=512", f"model={folder / 'model'}", f"tokenizer={model_dir}")
    with running_engine(folder, *settings) as engine:
        yield Poisoned(engine, token, healthy, breaks_after)


def ask(client: openai.OpenAI, prompt: list[int], **fields: Any) -> Any:
    """Asks for greedy tokens; the texts of two answers tell their tokens apart."""
    return client.completions.create(
        model="m", prompt=prompt, max_tokens=NUM_TOKENS, temperature=0, extra_body={"ignore_eos": True}, **fields
    )


def check_refusal(error: openai.InternalServerError) -> None:
    assert error.status_code == 500
    assert error.code == "not_finite"
    assert "non-finite" in error.message


def test_broken_requests_fail_alone_however_they_ask(poisoned: Poisoned) -> None:
    engine = poisoned.engine
    with client_of(engine) as client, ThreadPoolExecutor(24) as pool:
        alone = [ask(client, prompt).choices[0].text for prompt in HEALTHY]
        assert len(set(alone)) == len(HEALTHY)
        for _ in range(3):
            good = [pool.submit(ask, client, prompt, n=1 + index % 2) for index, prompt in enumerate(HEALTHY)]
            bad = [
                pool.submit(ask, client, prompt, **fields)
                for prompt in ([5, poisoned.token, 6], BREAKS_LATER)
                for fields in ({}, {"n": 3}, {"logprobs": 2})
            ]
            for future, text in zip(good, alone, strict=True):
                assert {choice.text for choice in future.result().choices} == {text}
            for future in bad:
                with pytest.raises(openai.InternalServerError) as failure:
                    future.result()
                check_refusal(failure.value)
    wait_idle(engine)
    assert engine.get("/readyz") == 200
    assert read_metrics(engine)["toka_running"] == 0


def test_a_stream_that_breaks_at_its_first_token_is_a_500(poisoned: Poisoned) -> None:
    with client_of(poisoned.engine) as client, pytest.raises(openai.InternalServerError) as failure:
        ask(client, [5, poisoned.token, 6], stream=True)
    check_refusal(failure.value)


def test_a_stream_that_breaks_later_delivers_what_came_and_ends_with_the_error(poisoned: Poisoned) -> None:
    engine = poisoned.engine
    with (
        client_of(engine) as client,
        client.completions.with_streaming_response.create(
            model="m",
            prompt=BREAKS_LATER,
            max_tokens=NUM_TOKENS,
            temperature=0,
            stream=True,
            logprobs=0,
            extra_body={"ignore_eos": True},
        ) as response,
    ):
        assert response.status_code == 200
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    *events, last = map(json.loads, lines)  # so there is no [DONE]
    assert last["error"]["code"] == "not_finite"
    num_tokens = sum(
        len(choice["logprobs"]["tokens"]) for each in events for choice in each["choices"] if choice["logprobs"]
    )
    assert num_tokens == poisoned.breaks_after
