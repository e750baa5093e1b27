"""Penalties through the whole engine: greedy answers in fp32 follow transformers' logits, changed by the definition.

The model is a tiny random one of tied embeddings, which likes to repeat itself: a token that counted one step late, or
not again after preemption, would show at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from toka_engine.server.tokenization import Tokenizer

from tests.api.conftest import client_of, read_metrics, running_engine
from tests.api.test_leaving_early import wait_idle
from tests.engine_process import EngineProcess
from tests.model.conftest import TINY
from tests.model.penalized import CASES, PLAIN, Asked, penalize

NUM_TOKENS = 48
SHARED = list(range(1000, 1040))
PROMPTS = [[*SHARED, 2000 + index, 2100, 2000 + index] for index in range(8)] + [
    [3000 + index] * 3 for index in range(4)
]
ENDS_SOON = [5]
"""Its sixth token, where none comes twice, is made the end token; all others ignore it."""
ASKED_OF_ALL = Asked(presence=0.5, frequency=0.7, repetition=1.3)
ASKED = [*CASES.values(), *CASES.values()][: len(PROMPTS)]


class Model:
    """The folder that the engine serves, and transformers' model of the same weights."""

    def __init__(self, folder: Path, tokenizer_dir: Path) -> None:
        import transformers

        self.num_changed = 0
        """Tokens of all answers that would have been others without penalties."""
        torch.manual_seed(7)
        changes = {
            "vocab_size": 49152,
            "tie_word_embeddings": True,
            "initializer_range": 0.05,
            "max_position_embeddings": 512,
        }
        self._reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TINY, **changes})).float().eval()
        self.folder, self.tokenizer_dir = folder, tokenizer_dir
        end = self._generate(ENDS_SOON, Asked(presence=2.0), 6)[-1]
        self._reference.config.eos_token_id = self._reference.generation_config.eos_token_id = end
        self._reference.save_pretrained(folder)
        self._tokenizer = Tokenizer(tokenizer_dir)

        self.answers = [self.answer(prompt, asked) for prompt, asked in zip(PROMPTS, ASKED, strict=True)]

    def answer(self, prompt: list[int], asked: Asked) -> list[str]:
        """The greedy answer, as the labels of its tokens."""
        ids = self._generate(prompt, asked, NUM_TOKENS)
        return [self._tokenizer.label_of(token).decode("utf-8", "replace") for token in ids]

    @torch.inference_mode()
    def _generate(self, prompt: list[int], asked: Asked, num_tokens: int) -> list[int]:
        ids: list[int] = []
        for _ in range(num_tokens):
            logits = self._reference(torch.tensor([prompt + ids])).logits[0, -1]
            ids.append(int(penalize(logits, prompt, ids, asked).argmax()))
            self.num_changed += ids[-1] != int(logits.argmax())
        return ids


@pytest.fixture(scope="module")
def model(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("tied") / "model", model_dir)


@contextmanager
def serving(model: Model, folder: Path, *arguments: str) -> Iterator[EngineProcess]:
    where = (f"model={model.folder}", f"tokenizer={model.tokenizer_dir}")
    with running_engine(folder, "dtype=float32", *where, *arguments) as engine:
        yield engine


def complete(client: openai.OpenAI, prompt: list[int], num_choices: int, asked: Asked) -> list[list[str]]:
    """The labels of each choice's tokens: whole for one choice, streamed for several."""
    fields = {} if asked == PLAIN else {f"{name}_penalty": value for name, value in asdict(asked).items()}
    answer: Any = client.completions.create(
        model="m",
        prompt=prompt,
        n=num_choices,
        max_tokens=NUM_TOKENS,
        temperature=0,
        logprobs=0,
        stream=num_choices > 1,
        extra_body={"ignore_eos": True, **fields},
    )
    tokens: list[list[str]] = [[] for _ in range(num_choices)]
    for piece in answer if num_choices > 1 else [answer]:
        for choice in piece.choices:
            tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
    return tokens


def check_all_at_once(engine: EngineProcess, model: Model, num_choices: list[int]) -> None:
    with client_of(engine) as client, ThreadPoolExecutor(len(PROMPTS)) as pool:
        counts = [num_choices[index % len(num_choices)] for index in range(len(PROMPTS))]
        answers = list(pool.map(lambda *each: complete(client, *each), PROMPTS, counts, ASKED))
    for choices, expected in zip(answers, model.answers, strict=True):
        assert all(labels == expected for labels in choices)


def test_penalized_answers_equal_the_definition_with_shared_prefixes_choices_and_streams(
    model: Model, tmp_path: Path
) -> None:
    assert model.num_changed > 200
    with serving(model, tmp_path) as engine:
        check_all_at_once(engine, model, [1, 3])
        before = read_metrics(engine)["toka_prefix_hit_tokens_total"]
        check_all_at_once(engine, model, [3, 1])
        assert read_metrics(engine)["toka_prefix_hit_tokens_total"] > before


@pytest.mark.slow
def test_penalized_answers_that_are_preempted_equal_the_definition(model: Model, tmp_path: Path) -> None:
    """The cache holds a part of the answers, and what finished before leads to the belief that answers are short."""
    with serving(model, tmp_path, "kv_cache_num_tokens=448") as engine:
        with client_of(engine) as client:
            short = client.completions.create(
                model="m", prompt=ENDS_SOON, n=32, max_tokens=NUM_TOKENS, temperature=0, presence_penalty=2.0
            )
            assert {choice.finish_reason for choice in short.choices} == {"stop"}
            before = read_metrics(engine)["toka_preemptions_total"]
            # Choices of one prompt start at once; there are pages for a part of what they grow to.
            tokens = complete(client, PROMPTS[0], 24, ASKED_OF_ALL)
        wait_idle(engine)
        assert read_metrics(engine)["toka_preemptions_total"] > before
    expected = model.answer(PROMPTS[0], ASKED_OF_ALL)
    assert all(labels == expected for labels in tokens)


def test_chat_takes_penalties(model: Model, tmp_path: Path) -> None:
    with serving(model, tmp_path) as engine, client_of(engine) as client:

        def ask(**penalties: float) -> list[str]:
            answer = client.chat.completions.create(
                model="m",
                messages=[{"role": "user", "content": "Hello"}],
                max_tokens=20,
                temperature=0,
                logprobs=True,
                extra_body={"ignore_eos": True},
                **penalties,  # type: ignore[arg-type]
            )
            logprobs = answer.choices[0].logprobs
            assert logprobs is not None
            assert logprobs.content is not None
            return [entry.token for entry in logprobs.content]

        assert len(set(ask())) < 20
        assert len(set(ask(presence_penalty=2.0, frequency_penalty=2.0))) == 20
