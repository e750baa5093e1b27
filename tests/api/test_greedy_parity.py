"""Greedy answers in fp32 equal those of transformers: alone, all at once, and under every policy of the scheduler."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from tokenizers import Tokenizer

from tests.api.conftest import client_of, read_metrics, running_engine
from tests.api.reference import NUM_TOKENS, PROMPTS, greedy_answers
from tests.engine_process import EngineProcess


class Expected:
    """The reference answers, as the API would write them."""

    def __init__(self, model_dir: Path) -> None:
        tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        self.texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in greedy_answers(model_dir, PROMPTS)]


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> Expected:
    return Expected(model_dir)


def complete(client: openai.OpenAI, prompt: str) -> str:
    answer = client.completions.create(
        model="m", prompt=prompt, max_tokens=NUM_TOKENS, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == NUM_TOKENS
    assert answer.choices[0].finish_reason == "length"
    return answer.choices[0].text


def complete_at_once(engine: EngineProcess) -> list[str]:
    with client_of(engine) as client, ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(lambda prompt: complete(client, prompt), PROMPTS))


@pytest.mark.timeout(900)
def test_twenty_prompts_one_after_another_equal_transformers(client: openai.OpenAI, expected: Expected) -> None:
    assert [complete(client, prompt) for prompt in PROMPTS] == expected.texts


def test_twenty_prompts_at_once_equal_transformers_with_hydragen(engine: EngineProcess, expected: Expected) -> None:
    before = read_metrics(engine)
    assert complete_at_once(engine) == expected.texts
    after = read_metrics(engine)
    assert after["toka_hydragen_rows_total"] > before.get("toka_hydragen_rows_total", 0.0)
    assert after["toka_prefix_hit_tokens_total"] > before.get("toka_prefix_hit_tokens_total", 0.0)


POLICIES = {
    "prefix_cache_without_hydragen": ("use_hydragen=F",),
    "no_prefix_cache_and_no_hydragen": ("use_hydragen=F", "use_prefix_cache=F"),
    "hydragen_without_prefix_cache": ("use_prefix_cache=F",),
    "one_step_at_a_time": ("scheduling_steps_ahead=1",),
    "small_steps": ("max_tokens_per_forward=24", "max_seqs_per_forward=5"),
    "another_page_size": ("page_size=32", "hydragen_min_group_size=2"),
}


@pytest.mark.parametrize("name", POLICIES)
def test_twenty_prompts_at_once_equal_transformers_under(
    name: str, model_dir: Path, expected: Expected, tmp_path: Path
) -> None:
    arguments = ("dtype=float32", "kv_cache_num_tokens=(16 * 1024)", *POLICIES[name])
    with running_engine(tmp_path, f"model={model_dir}", *arguments) as engine:
        assert complete_at_once(engine) == expected.texts


def test_preempted_sequences_equal_transformers(model_dir: Path, expected: Expected, tmp_path: Path) -> None:
    """The cache holds a part of the 20 answers, and what finished before leads to the belief that answers are short."""
    arguments = ("dtype=float32", "kv_cache_num_tokens=640", "use_hydragen=F")
    question: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]
    with running_engine(tmp_path, f"model={model_dir}", *arguments) as engine:
        with client_of(engine) as client:
            client.chat.completions.create(model="m", messages=question, n=32, max_tokens=500, temperature=0)
        assert complete_at_once(engine) == expected.texts
        assert read_metrics(engine)["toka_preemptions_total"] > 0
