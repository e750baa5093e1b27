"""Logprobs of prompts through the whole engine: those of transformers to four digits, in both forms of the API."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer

from tests.api.conftest import client_of, running_engine
from tests.api.reference import PROMPTS
from tests.engine_process import EngineProcess

TEXTS = [PROMPTS[0], PROMPTS[8], PROMPTS[18], PROMPTS[0], "a b"]
"""Two of them the same: the second one may not be taken from the prefix cache."""


class Truth:
    """Transformers' logprobs of a text's tokens."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer.encode(text).ids
        return found

    def logprobs(self, ids: list[int]) -> Any:
        """[len(ids) - 1, vocab] in float64."""
        with self._torch.inference_mode():
            return self._torch.log_softmax(self._model(self._torch.tensor([ids])).logits[0, :-1].double(), dim=1)


@pytest.fixture(scope="module")
def truth(model_dir: Path) -> Truth:
    return Truth(model_dir)


def check_echo(truth: Truth, text: str, found: Any, num_top: int, num_generated: int) -> None:
    """Compare a choice's logprobs with transformers' logprobs of its prompt."""
    ids = truth.ids(text)
    own = truth.logprobs(ids)
    assert found.token_logprobs[0] is None
    assert len(found.token_logprobs) == len(found.tokens) == len(found.text_offset) == len(ids) + num_generated
    for place, token in enumerate(ids[1:], 1):
        assert found.token_logprobs[place] == pytest.approx(float(own[place - 1, token]), abs=1e-4)
    assert found.text_offset[0] == 0
    assert found.text_offset == sorted(found.text_offset)
    if num_generated:
        assert found.text_offset[len(ids)] == len(text)
    if not num_top:
        assert found.top_logprobs is None
        return
    assert found.top_logprobs[0] is None
    for place in range(1, len(ids)):
        best = own[place - 1].topk(num_top).values.tolist()
        values = sorted(found.top_logprobs[place].values(), reverse=True)
        assert values[:num_top] == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
@pytest.mark.parametrize("num_top", [0, 3])
def test_echo_gives_the_logprobs_of_prompt_and_completion(
    client: openai.OpenAI, truth: Truth, max_tokens: int, num_top: int
) -> None:
    answer = client.completions.create(
        model="m",
        prompt=TEXTS,
        echo=True,
        logprobs=num_top,
        max_tokens=max_tokens,
        temperature=0,
        extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == max_tokens * len(TEXTS)
    for text, choice in zip(TEXTS, answer.choices, strict=True):
        assert choice.text.startswith(text)
        assert choice.finish_reason == "length"
        check_echo(truth, text, choice.logprobs, num_top, max_tokens)
    again = [choice.logprobs.token_logprobs[1:] for choice in (answer.choices[0], answer.choices[3])]  # type: ignore[union-attr, index]
    assert again[0] == pytest.approx(again[1], abs=1e-4)


def test_token_ids_choices_and_streams_give_the_same(client: openai.OpenAI, truth: Truth) -> None:
    ids = truth.ids(TEXTS[1])
    body: dict[str, Any] = {
        "model": "m",
        "prompt": ids,
        "echo": True,
        "logprobs": 1,
        "max_tokens": 4,
        "n": 3,
        "seed": 5,
    }
    whole = client.completions.create(**body)
    for choice in whole.choices:
        check_echo(truth, TEXTS[1], choice.logprobs, 1, len(choice.logprobs.tokens) - len(ids))  # type: ignore[union-attr]
    texts, logprobs = [""] * 3, [[] for _ in range(3)]  # type: ignore[var-annotated]
    for event in client.completions.create(**body, stream=True):
        for choice in event.choices:
            texts[choice.index] += choice.text
            logprobs[choice.index] += choice.logprobs.token_logprobs if choice.logprobs else []
    assert texts == [choice.text for choice in whole.choices]
    for streamed, choice in zip(logprobs, whole.choices, strict=True):
        assert streamed == choice.logprobs.token_logprobs  # type: ignore[union-attr]


def test_a_greedy_continuation_is_seen_as_greedy_by_equality(client: openai.OpenAI) -> None:
    """Evaluations decide it so: each token's logprob equals that of the likeliest."""
    answer = client.completions.create(model="m", prompt=PROMPTS[9], max_tokens=24, temperature=0)
    text = PROMPTS[9] + answer.choices[0].text
    scored = client.completions.create(model="m", prompt=text, max_tokens=1, temperature=0, logprobs=1, echo=True)
    found = scored.choices[0].logprobs
    assert found is not None
    assert found.text_offset is not None
    begin = found.text_offset.index(len(PROMPTS[9]))
    pairs = list(zip(found.token_logprobs[begin:], found.top_logprobs[begin:], strict=True))  # type: ignore[index]
    assert len(pairs) == 25
    assert all(logprob == max(top.values()) for logprob, top in pairs)


def test_prompt_logprobs_have_the_form_of_vllm(engine: EngineProcess, client: openai.OpenAI, truth: Truth) -> None:
    ids, own = truth.ids(TEXTS[1]), truth.logprobs(truth.ids(TEXTS[1]))
    answer = client.completions.create(model="m", prompt=TEXTS[1], max_tokens=1, extra_body={"prompt_logprobs": 2})
    first, *rest = answer.choices[0].prompt_logprobs  # type: ignore[attr-defined]
    assert first is None
    assert len(rest) == len(ids) - 1
    for place, (token, entries) in enumerate(zip(ids[1:], rest, strict=True)):
        assert entries[str(token)]["logprob"] == pytest.approx(float(own[place, token]), abs=1e-4)
        assert entries[str(token)]["rank"] == int((own[place] > own[place, token]).sum()) + 1
        assert truth.tokenizer.decode([token]) == entries[str(token)]["decoded_token"]
        for rank, best in enumerate(own[place].topk(2).indices.tolist(), 1):
            assert entries[str(best)]["rank"] == rank
        assert len(entries) in (2, 3)
    chat = client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": "Hi"}], max_tokens=1, extra_body={"prompt_logprobs": 0}
    )
    listed = chat.prompt_logprobs  # type: ignore[attr-defined]
    assert chat.usage is not None
    assert len(listed) == chat.usage.prompt_tokens
    assert all(len(entries) == 1 for entries in listed[1:])


@pytest.fixture(scope="module")
def small_engine(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """Two ranks, chunks of a few tokens, and so few pages that streams are preempted."""
    folder = tmp_path_factory.mktemp("small")
    arguments = ("dtype=float32", "tp_size=3", "kv_cache_num_tokens=640", "max_tokens_per_forward=48")
    with running_engine(folder, f"model={model_dir}", *arguments) as engine:
        yield engine


@pytest.mark.slow
def test_ranks_small_chunks_and_preemptions_change_nothing(small_engine: EngineProcess, truth: Truth) -> None:
    with client_of(small_engine) as client:
        answer = client.completions.create(
            model="m",
            prompt=[PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[8]],
            echo=True,
            logprobs=2,
            max_tokens=60,
            temperature=0,
            extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
        )
    for text, choice in zip([PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[8]], answer.choices, strict=True):
        check_echo(truth, text, choice.logprobs, 2, 60)
        assert not any(math.isnan(value) for value in choice.logprobs.token_logprobs[1:])  # type: ignore[union-attr]
