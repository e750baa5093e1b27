"""Greedy answers in fp32 equal those of transformers: alone and all at once."""

from __future__ import annotations

from collections.abc import Callable

import openai
import pytest

from tests.api.asking import complete, complete_at_once
from tests.api.conftest import read_metrics
from tests.api.reference import NUM_TOKENS, ONE_PAGE, PROMPTS
from tests.engine_process import EngineProcess


@pytest.mark.timeout(900)
def test_twenty_prompts_one_after_another_equal_transformers(
    client: openai.OpenAI, expected: Callable[[int], list[str]]
) -> None:
    assert [complete(client, prompt, ONE_PAGE) for prompt in PROMPTS] == expected(ONE_PAGE)


def test_twenty_prompts_at_once_equal_transformers_with_hydragen(
    engine: EngineProcess, expected: Callable[[int], list[str]]
) -> None:
    before = read_metrics(engine)
    assert complete_at_once(engine, NUM_TOKENS) == expected(NUM_TOKENS)
    after = read_metrics(engine)
    assert after["toka_hydragen_rows_total"] > before.get("toka_hydragen_rows_total", 0.0)
    assert after["toka_prefix_hit_tokens_total"] > before.get("toka_prefix_hit_tokens_total", 0.0)
