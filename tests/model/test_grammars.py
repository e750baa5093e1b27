"""Rows that follow a grammar: whatever samples them, their outputs are texts of it; rows beside them are as ever."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from llguidance import LLTokenizer
from llguidance._tokenizer import TokenizerWrapper
from toka_engine.grammar.compiling import GrammarError, compile_grammar
from toka_engine.grammar.source import GrammarSource
from toka_engine.messages import GRAMMAR_FAILED, GrammarReady
from toka_engine.model.grammar_compiler import GrammarCompiler
from toka_engine.model.ranks import Ranks

from tests.model.driving import Driver, ints, load
from tests.model.thread_ranks import run_ranks

MakeTiny = Callable[..., tuple[Any, Path]]
END = 2
PROMPT = [5, 6, 7, 8, 9]
SAMPLING: dict[str, list[float]] = {  # by slot; slot 4 has no grammar
    "temperature": [0, 1.0, 1.0, 1.5, 0, 0.8],
    "seed": [-1, -1, 6, 7, -1, 9],
    "top_k": [0, 0, 0, 3, 0, 0],
    "top_p": [1, 1, 1, 0.7, 1, 0.9],
    "frequency_penalty": [0, 0, 0, 0, 0, 0.5],
    "num_logprobs": [-1, -1, 2, -1, 0, -1],
}
REGEX = r"[a-e]{3}-([0-9]{2}|xyz)"


class Bytes:
    """A tokenizer whose token i is byte i; its end is token END."""

    eos_token_id = END
    bos_token_id = None
    tokens = [bytes([byte]) if byte > 8 else b"" for byte in range(256)]  # noqa: RUF012
    special_token_ids = [END]  # noqa: RUF012

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


VOCABULARY = LLTokenizer(TokenizerWrapper(Bytes()), n_vocab=256, eos_token=[END])


def add_grammar(driver: Driver, number: int, kind: Any, text: str) -> None:
    driver.worker.runner.grammars.add(number, compile_grammar(GrammarSource(kind, text), VOCABULARY))


def text_of(ids: list[int]) -> str:
    return bytes(ids[: ids.index(END)] if END in ids else ids).decode()


def generate(driver: Driver, grammar: list[int], num_tokens: int = 8) -> list[list[int]]:
    return driver.generate([PROMPT] * 6, num_tokens, grammar=grammar, **SAMPLING)


def test_rows_follow_their_grammar_and_the_others_are_as_without_any(make_tiny: MakeTiny) -> None:
    _, folder = make_tiny()
    driver = Driver(load(folder))
    plain = generate(driver, [0] * 6)
    driver.reset()
    add_grammar(driver, 3, "regex", REGEX)
    outputs = generate(driver, [3, 3, 3, 3, 0, 3])
    for slot in (0, 1, 2, 3, 5):
        assert re.fullmatch(REGEX, text_of(outputs[slot])), outputs[slot]
    assert outputs[4] == plain[4]
    driver.reset()
    assert generate(driver, [0] * 6)[2] == plain[2]  # its slot has lost the grammar


def test_choices_of_one_prompt_follow_the_grammar_each_for_itself(make_tiny: MakeTiny) -> None:
    _, folder = make_tiny()
    driver = Driver(load(folder))
    add_grammar(driver, 1, "regex", "(abc|xyz){4}")
    new = driver.add_slots([0, 1, 2, 3], temperature=2.0, seed=[4, 5, 6, 7], grammar=1)
    outputs = [[token] for token in driver.prefill({0: PROMPT}, fanout={0: [0, 1, 2, 3]}, **new).ids.tolist()]
    for slot in (1, 2, 3):
        driver.lengths[slot], driver.pages[slot] = len(PROMPT), []
        driver.run(**driver.grow({slot: len(PROMPT)}), copy_from=ints(driver.pages[0][0]), copy_to=ints(slot + 4))
    for _ in range(12):
        for output, token in zip(outputs, driver.decode([0, 1, 2, 3]).ids.tolist(), strict=True):
            output.append(token)
    texts = [text_of(output) for output in outputs]
    assert all(re.fullmatch("(abc|xyz){4}", text) for text in texts)
    assert len(set(texts)) > 1


def test_an_output_that_was_interrupted_goes_on_where_it_was(make_tiny: MakeTiny) -> None:
    _, folder = make_tiny()
    driver = Driver(load(folder))
    add_grammar(driver, 1, "regex", "(ab|cd|ef|gh){5}")
    whole = driver.generate([PROMPT], 11, temperature=0.0, grammar=1)[0]
    driver.reset()
    kept = whole[:5]
    driver.generate([PROMPT] * 2, 2, grammar=[0, 1])
    new = driver.add_slots([1], grammar=1, num_sampled=len(kept))
    driver.pages[1] = []
    rest = driver.prefill({1: PROMPT + kept}, **new, grammar_outputs=ints(*kept)).ids.tolist()
    rest += [int(driver.decode([1]).ids[0]) for _ in range(5)]
    assert kept + rest == whole


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_follow_a_grammar_as_one_rank_does(size: int, make_tiny: MakeTiny) -> None:
    _, folder = make_tiny()

    def run(ranks: Ranks) -> list[list[int]]:
        driver = Driver(load(folder, ranks, seed=3))
        add_grammar(driver, 3, "regex", REGEX)
        return generate(driver, [3, 3, 3, 3, 0, 3])

    (expected,) = run_ranks(1, run)
    for outputs in run_ranks(size, run):
        assert [outputs[slot] for slot in (0, 2, 3, 4, 5)] == [expected[slot] for slot in (0, 2, 3, 4, 5)]
        assert re.fullmatch(REGEX, text_of(outputs[1]))  # drawn without a seed: by other numbers on other ranks


def test_a_grammar_without_a_text_fails_its_own_row_alone(make_tiny: MakeTiny) -> None:
    _, folder = make_tiny()
    driver = Driver(load(folder))
    add_grammar(driver, 1, "json_schema", '{"$ref":"#"}')
    add_grammar(driver, 2, "choice", '["left","right"]')
    outputs = driver.generate([PROMPT] * 3, 6, grammar=[1, 2, 0])
    assert set(outputs[0]) == {GRAMMAR_FAILED}
    assert text_of(outputs[1]) in ("left", "right")
    assert min(outputs[2]) >= 0


def test_the_compiler_announces_what_it_has_compiled_and_says_why_it_could_not(
    make_tiny: MakeTiny, smollm2: Path
) -> None:
    import queue

    _, folder = make_tiny()
    worker = load(folder)
    answers: queue.SimpleQueue[GrammarReady] = queue.SimpleQueue()
    compiler = GrammarCompiler(smollm2, 49152, worker.runner.grammars, answers.put)
    compiler.take(1, GrammarSource("regex", "a+", end_ids=(2,)))
    compiler.take(2, GrammarSource("lark", "start: none", end_ids=(2,)))
    assert answers.get(timeout=60) == GrammarReady(1)
    failed = answers.get(timeout=60)
    assert failed.number == 2
    assert "none" in failed.error


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("regex", "(a", "unclosed"),
        ("regex", "(?=a)b", "look-around"),
        ("json_schema", '{"type":"array","uniqueItems":true}', "uniqueItems"),
        ("json_schema", '{"type":"string","format":"nonsense"}', "nonsense"),
        ("json_schema", '{"$ref":"https://example.com/schema.json"}', "example.com"),
        ("json_schema", '{"type":"integer","minimum":5,"maximum":1}', "minimum"),
        ("lark", "start: other", "other"),
    ],
)
def test_a_source_that_is_no_grammar_is_refused_with_its_reason(kind: Any, text: str, words: str) -> None:
    with pytest.raises(GrammarError, match=words):
        compile_grammar(GrammarSource(kind, text), VOCABULARY)


@pytest.mark.parametrize("choice", ['a"b\\c', "new\nline", "é\U0001f600", "/x/", "a b  c"])
def test_a_choice_is_taken_as_it_is_written(choice: str) -> None:
    source = GrammarSource("choice", msgspec.json.encode([choice, "other"]).decode())
    matcher = compile_grammar(source, VOCABULARY)
    assert matcher.consume_tokens(list(choice.encode()))
    assert matcher.is_accepting()


def test_white_space_between_json_tokens_is_one_blank_or_newline_at_most() -> None:
    matcher = compile_grammar(GrammarSource("json_object", ""), VOCABULARY)
    assert matcher.deep_copy().consume_tokens(list(b'{ "a":\n[1, 2]}'))
    for text in (b'{  "a"', b'{"a": \n', b"{\t", b" {"):
        assert matcher.deep_copy().try_consume_tokens(list(text)) < len(text)


def test_masks_have_a_bit_for_each_token_of_the_model(make_tiny: MakeTiny) -> None:
    _, folder = make_tiny()
    driver = Driver(load(folder))
    add_grammar(driver, 1, "regex", "[ab]")
    driver.generate([PROMPT], 1, grammar=1)
    driver.run(**driver.add_slots([3], grammar=1))
    bits = np.zeros((1, driver.worker.runner.grammars.num_words), np.int32)
    driver.worker.runner.grammars.fill(ints(3), bits)
    assert np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist() == [ord("a"), ord("b")]
