"""Asking for the greedy answers that tests/api/reference.py has the truth of."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import openai

from tests.api.conftest import client_of
from tests.api.reference import PROMPTS
from tests.engine_process import EngineProcess


def complete(client: openai.OpenAI, prompt: str, num_tokens: int) -> str:
    answer = client.completions.create(
        model="m", prompt=prompt, max_tokens=num_tokens, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == num_tokens
    assert answer.choices[0].finish_reason == "length"
    return answer.choices[0].text


def complete_at_once(engine: EngineProcess, num_tokens: int) -> list[str]:
    with client_of(engine) as client, ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(lambda prompt: complete(client, prompt, num_tokens), PROMPTS))
