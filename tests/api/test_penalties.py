"""Penalties through the whole engine: greedy answers in fp32 equal transformers' logits changed by the definition."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from tokenizers import Tokenizer

from tests.api.conftest import client_of, read_metrics, running_engine
from tests.api.reference import NUM_TOKENS, PROMPTS, greedy_answers
from tests.engine_process import EngineProcess
from tests.model.penalized import PLAIN, Asked

ASKED = Asked(presence=0.5, frequency=0.3, repetition=1.1)
FIELDS = {f"{name}_penalty": value for name, value in asdict(ASKED).items()}


class Expected:
    """Answers with and without penalties, as the API would write them."""

    def __init__(self, model_dir: Path) -> None:
        tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))

        def texts_of(asked: Asked) -> list[str]:
            answers = greedy_answers(model_dir, PROMPTS, asked)
            return [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]

        self.penalized, self.plain = texts_of(ASKED), texts_of(PLAIN)


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> Expected:
    return Expected(model_dir)


def complete(client: openai.OpenAI, prompt: str, num_choices: int, fields: dict[str, float]) -> list[str]:
    """The text of each choice: whole for one, streamed for several."""
    answer = client.completions.create(
        model="m",
        prompt=prompt,
        n=num_choices,
        max_tokens=NUM_TOKENS,
        temperature=0,
        stream=num_choices > 1,
        extra_body={"ignore_eos": True, **fields},
    )
    if isinstance(answer, openai.Stream):
        texts = [""] * num_choices
        for chunk in answer:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        return texts
    return [choice.text for choice in answer.choices]


def check_all_at_once(engine: EngineProcess, expected: Expected, num_choices: list[int]) -> None:
    """Every prompt with penalties, every fourth without them too, side by side."""
    plain = range(0, len(PROMPTS), 4)
    with client_of(engine) as client, ThreadPoolExecutor(len(PROMPTS) + len(plain)) as pool:
        penalized = [
            pool.submit(complete, client, prompt, num_choices[index % len(num_choices)], FIELDS)
            for index, prompt in enumerate(PROMPTS)
        ]
        others = [pool.submit(complete, client, PROMPTS[index], 1, {}) for index in plain]
        for future, text in zip(penalized, expected.penalized, strict=True):
            assert set(future.result()) == {text}
        assert [future.result()[0] for future in others] == [expected.plain[index] for index in plain]


@pytest.mark.timeout(900)
def test_penalized_answers_equal_the_definition_with_shared_prefixes_choices_and_streams(
    engine: EngineProcess, expected: Expected
) -> None:
    assert sum(a != b for a, b in zip(expected.penalized, expected.plain, strict=True)) > len(PROMPTS) // 2
    before = read_metrics(engine)
    check_all_at_once(engine, expected, [1, 3])
    after = read_metrics(engine)
    assert after["toka_hydragen_rows_total"] > before.get("toka_hydragen_rows_total", 0.0)
    assert after["toka_prefix_hit_tokens_total"] > before.get("toka_prefix_hit_tokens_total", 0.0)


@pytest.mark.timeout(900)
def test_penalized_answers_that_are_preempted_equal_the_definition(
    model_dir: Path, expected: Expected, tmp_path: Path
) -> None:
    """The cache holds a part of the answers, and what finished before leads to the belief that answers are short."""
    arguments = ("dtype=float32", "kv_cache_num_tokens=640")
    question: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]
    with running_engine(tmp_path, f"model={model_dir}", *arguments) as engine:
        with client_of(engine) as client:
            client.chat.completions.create(model="m", messages=question, n=32, max_tokens=500, temperature=0)
        check_all_at_once(engine, expected, [1])
        assert read_metrics(engine)["toka_preemptions_total"] > 0


def test_chat_takes_penalties(client: openai.OpenAI) -> None:
    """A token that is never taken twice: with the largest presence penalty a model that lists numbers soon stops."""
    question: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Say the word yes thirty times."}]

    def ask(presence_penalty: float) -> str:
        answer = client.chat.completions.create(
            model="m", messages=question, max_tokens=40, temperature=0, presence_penalty=presence_penalty
        )
        return answer.choices[0].message.content or ""

    assert ask(0.0) != ask(2.0)
