"""Rows that follow a grammar on the GPU: in graphs and without, with two steps in flight, beside rows that do not."""

from __future__ import annotations

import re
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from llguidance import LLTokenizer
from llguidance._tokenizer import TokenizerWrapper
from toka_engine.grammar.compiling import compile_grammar
from toka_engine.grammar.source import GrammarSource
from toka_engine.messages import GRAMMAR_FAILED, Tokens
from toka_engine.model.backend import Launched

from tests.gpu.test_parity import TINY, drive, make
from tests.model.driving import Driver
from tests.model.test_grammars import END, PROMPT, REGEX, SAMPLING, Bytes, text_of


class PaddedBytes(Bytes):
    tokens = [*Bytes.tokens, *[b""] * (TINY["vocab_size"] - 256)]  # noqa: RUF012


VOCABULARY = LLTokenizer(TokenizerWrapper(PaddedBytes()), n_vocab=TINY["vocab_size"], eos_token=[END])


@pytest.fixture(scope="module", params=[True, False], ids=["graphs", "eager"])
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Driver:
    folder: Path = tmp_path_factory.mktemp("tiny")
    make("Llama", folder)
    return drive(folder, use_cudagraphs=request.param, kv_cache_num_tokens=65536)


def add_grammar(driver: Driver, number: int, kind: Any, text: str) -> None:
    driver.worker.runner.grammars.add(number, compile_grammar(GrammarSource(kind, text), VOCABULARY))


def generate_ahead(driver: Driver, grammar: list[int], num_tokens: int) -> list[list[int]]:
    """Generate as Driver.generate does, with as many decode steps in flight as the runner allows."""
    driver.reset()
    slots = list(range(len(grammar)))
    new = driver.add_slots(slots, grammar=grammar, **{name: values[: len(slots)] for name, values in SAMPLING.items()})
    outputs = [[token] for token in driver.prefill(dict.fromkeys(slots, PROMPT), **new).ids.tolist()]
    flying: deque[Launched] = deque()

    def finish() -> None:
        tokens: Tokens = driver.worker.runner.finish(flying.popleft())
        for output, token in zip(outputs, tokens.ids.tolist(), strict=True):
            output.append(token)

    for _ in range(num_tokens - 1):
        if len(flying) == driver.worker.runner.max_steps_in_flight:
            finish()
        flying.append(driver.launch_decode(slots))
    while flying:
        finish()
    return outputs


@pytest.mark.parametrize("delay_cycles", [0, 20_000_000])
def test_rows_follow_their_grammar_while_steps_run_ahead(driver: Driver, delay_cycles: int) -> None:
    plain = generate_ahead(driver, [0] * 6, 9)
    add_grammar(driver, 3, "regex", REGEX)
    torch.cuda._sleep(delay_cycles)
    outputs = generate_ahead(driver, [3, 3, 3, 3, 0, 3], 9)
    for slot in (0, 1, 2, 3, 5):
        assert re.fullmatch(REGEX, text_of(outputs[slot])), outputs[slot]
    assert outputs[4] == plain[4]


def test_many_rows_are_filled_by_the_librarys_threads(driver: Driver) -> None:
    add_grammar(driver, 4, "regex", "[a-f]{10}-(left|right)")
    driver.reset()
    count = 300
    outputs = driver.generate([PROMPT] * count, 17, temperature=1.0, grammar=4)
    texts = [text_of(output) for output in outputs]
    assert all(re.fullmatch("[a-f]{10}-(left|right)", text) for text in texts)
    assert len(set(texts)) > count // 2


def test_a_grammar_without_a_text_fails_its_own_row_alone(driver: Driver) -> None:
    add_grammar(driver, 1, "json_schema", '{"$ref":"#"}')
    add_grammar(driver, 2, "choice", '["left","right"]')
    driver.reset()
    outputs = driver.generate([PROMPT] * 3, 6, grammar=[1, 2, 0])
    assert set(outputs[0]) == {GRAMMAR_FAILED}
    assert text_of(outputs[1]) in ("left", "right")
    assert min(outputs[2]) >= 0
