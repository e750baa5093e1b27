"""Greedy answers in fp32 equal those of transformers under every policy of the scheduler.

A file of its own beside test_greedy_parity.py, so that the two can run at once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.api.asking import complete_at_once
from tests.api.conftest import client_of, read_metrics, running_engine
from tests.api.reference import NUM_TOKENS, ONE_PAGE
from tests.marks import rest_is_slow

POLICIES = {
    "prefix_cache_without_hydragen": ("use_hydragen=F",),
    "neither_and_one_step_at_a_time": ("use_hydragen=F", "use_prefix_cache=F", "scheduling_steps_ahead=1"),
    "hydragen_without_prefix_cache_in_small_steps": (
        "use_prefix_cache=F",
        "max_tokens_per_forward=24",
        "max_seqs_per_forward=5",
    ),
    "another_page_size": ("page_size=32", "hydragen_min_group_size=2"),
}

IN_EVERY_RUN = "hydragen_without_prefix_cache_in_small_steps"


@pytest.mark.parametrize("name", rest_is_slow([IN_EVERY_RUN], POLICIES))
def test_twenty_prompts_at_once_equal_transformers_under(
    name: str, model_dir: Path, expected: Callable[[int], list[str]], tmp_path: Path
) -> None:
    arguments = ("dtype=float32", "kv_cache_num_tokens=(16 * 1024)", *POLICIES[name])
    with running_engine(tmp_path, f"model={model_dir}", *arguments) as engine:
        assert complete_at_once(engine, ONE_PAGE) == expected(ONE_PAGE)


def test_preempted_sequences_equal_transformers(
    model_dir: Path, expected: Callable[[int], list[str]], tmp_path: Path
) -> None:
    """The cache holds a part of the 20 answers, and what finished before leads to the belief that answers are short."""
    arguments = ("dtype=float32", "kv_cache_num_tokens=640", "use_hydragen=F")
    question: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]
    with running_engine(tmp_path, f"model={model_dir}", *arguments) as engine:
        with client_of(engine) as client:
            client.chat.completions.create(model="m", messages=question, n=32, max_tokens=500, temperature=0)
        assert complete_at_once(engine, NUM_TOKENS) == expected(NUM_TOKENS)
        assert read_metrics(engine)["toka_preemptions_total"] > 0
