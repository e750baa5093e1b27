"""SmolLM2 with its real weights on the GPU: text, not noise, so that greedy tokens must agree, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toka_engine.builtin import ensure_builtin

from tests.gpu.test_parity import check, drive, generate

QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain in two sentences why the sky is blue.",
    "List the first ten prime numbers.",
    "Translate into Spanish: the cat sleeps on the sofa.",
    "Tell me a short story about a lighthouse keeper who finds a message in a bottle.",
    "def fibonacci(n):",
    "Who wrote Hamlet, and when?",
]
NUM_TOKENS = 80


@pytest.fixture(scope="module")
def folder() -> Path:
    return ensure_builtin()


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().eval()


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[list[int]]:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
    texts = [tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True) for each in messages]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@pytest.mark.parametrize("count", [1, len(QUESTIONS)])
@pytest.mark.parametrize("use_cudagraphs", [True, False], ids=["graphs", "eager"])
def test_logits_and_greedy_tokens_are_those_of_transformers(
    reference: Any, folder: Path, prompts: list[list[int]], use_cudagraphs: bool, count: int
) -> None:
    chosen = prompts[-count:]
    tokens, logits = generate(drive(folder, use_cudagraphs=use_cudagraphs), chosen, num_tokens=NUM_TOKENS)
    check(reference, chosen, tokens, logits, min_agreement=0.99)
