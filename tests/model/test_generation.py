"""Greedy text equals transformers' on SmolLM2; batches, Hydragen, prefix sharing and seeds change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toka_engine.slot_parameters import SlotBatch
from tokenizers import Tokenizer

from tests.model.driving import Driver, ints

NUM_TOKENS = 32
"""Two pages; tests/api asks the whole engine for twice as many."""
SUBJECTS = (
    "The capital of France is",
    "Once upon a time there was a small",
    "def fibonacci(n):",
    "Photosynthesis is the process by which",
    "In 1969, Neil Armstrong",
    "To make a good cup of coffee, you",
    "The three laws of thermodynamics are",
    "SELECT name, age FROM users WHERE",
    "Roses are red, violets are",
    "The quick brown fox",
    "Water boils at",
    "An operating system is",
    "Shakespeare wrote",
    "import numpy as np\n\nx = np.",
    "The largest planet in our solar system",
    "Dear Sir or Madam, I am writing to",
    "1, 1, 2, 3, 5, 8,",
    "The mitochondria is the powerhouse of",
    "A list of the primary colours:",
    "Machine learning is a field of study that gives computers the ability to learn without being told. It",
)


@pytest.fixture(scope="module")
def prompts(smollm2: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in SUBJECTS]


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> Any:
    """transformers' model in fp32, of the same files."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)


@torch.no_grad()
def check_greedy(reference: Any, prompt: list[int], output: list[int]) -> None:
    """Each token is the reference's most likely one after those before it: by induction, its greedy text."""
    logits = reference(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
    assert output == logits.argmax(dim=1).tolist()


@pytest.fixture(scope="module")
def batch_outputs(_smollm2_drivers: dict[str, Driver], prompts: list[list[int]]) -> list[list[int]]:
    """Our greedy text of all prompts, run together."""
    driver = _smollm2_drivers["float32"]
    driver.reset()
    return driver.generate(prompts, NUM_TOKENS)


def test_twenty_prompts_at_once_give_the_reference_text(
    reference: Any, prompts: list[list[int]], batch_outputs: list[list[int]]
) -> None:
    for prompt, output in zip(prompts, batch_outputs, strict=True):
        assert len(output) == NUM_TOKENS
        check_greedy(reference, prompt, output)


@pytest.mark.parametrize("index", [0, 19])  # tests/api asks each of twenty alone
def test_one_prompt_alone_gives_the_text_that_it_gives_among_twenty(
    index: int, smollm2_fp32: Driver, prompts: list[list[int]], batch_outputs: list[list[int]]
) -> None:
    assert smollm2_fp32.generate([prompts[index]], NUM_TOKENS) == [batch_outputs[index]]


def share_prefix(
    driver: Driver, prefix: list[int], tails: list[list[int]], num_tokens: int, **groups: Any
) -> list[list[int]]:
    """Slot 0 holds the prefix (full pages); slots 1.. share its pages, prefill their tails, decode together."""
    driver.reset()
    assert len(prefix) % driver.page_size == 0
    driver.prefill({0: prefix})
    slots = list(range(1, len(tails) + 1))
    for slot in slots:
        driver.pages[slot] = list(driver.pages[0])
    setup = driver.add_slots(slots, length=len(prefix))
    num_pages = len(prefix) // driver.page_size
    shared = {
        "append_slots": np.repeat(ints(*slots), num_pages),
        "append_indices": np.tile(np.arange(num_pages, dtype=np.int32), len(slots)),
        "append_pages": np.tile(ints(*driver.pages[0]), len(slots)),
    }
    driver.run(**setup, **shared)
    outputs = []
    for slot, tail in zip(slots, tails, strict=True):
        outputs.append([int(driver.prefill({slot: tail}, new=SlotBatch()).ids[0])])
    for _ in range(num_tokens - 1):
        for output, token in zip(outputs, driver.decode(slots, **groups).ids.tolist(), strict=True):
            output.append(token)
    return outputs


def make_groups(*groups: tuple[int, int, int, int]) -> dict[str, Any]:
    """(first_row, num_rows, first_column, num_columns) of each group."""
    names = ("group_first_rows", "group_num_rows", "group_first_columns", "group_num_columns")
    return {name: ints(*(group[index] for group in groups)) for index, name in enumerate(names)}


GROUPINGS: dict[str, dict[str, Any]] = {
    "one group of all": make_groups((0, 8, 0, 4)),
    "part of the rows": make_groups((2, 5, 0, 4)),
    "part of the pages": make_groups((0, 8, 0, 3)),
    "two groups": make_groups((0, 4, 0, 4), (4, 4, 0, 2)),
    "two levels": make_groups((0, 8, 0, 2), (0, 4, 2, 2), (4, 4, 2, 1)),
    "three levels": make_groups((0, 8, 0, 1), (0, 6, 1, 1), (0, 3, 2, 2)),
}


@pytest.fixture(scope="module")
def tails(prompts: list[list[int]]) -> list[list[int]]:
    return prompts[2:10]


@pytest.fixture(scope="module")
def prefix(prompts: list[list[int]]) -> list[int]:
    return [token for prompt in prompts for token in prompt][:64]


@pytest.fixture(scope="module")
def plain_outputs(_smollm2_drivers: dict[str, Driver], prefix: list[int], tails: list[list[int]]) -> list[list[int]]:
    """The text after prefix and tail, each prompt by itself, without groups."""
    driver = _smollm2_drivers["float32"]
    driver.reset()
    return [driver.generate([prefix + tail], 8)[0] for tail in tails]


@pytest.mark.parametrize("name", list(GROUPINGS))
def test_hydragen_gives_the_text_of_plain_attention(
    name: str, smollm2_fp32: Driver, prefix: list[int], tails: list[list[int]], plain_outputs: list[list[int]]
) -> None:
    assert share_prefix(smollm2_fp32, prefix, tails, 8, **GROUPINGS[name]) == plain_outputs


def test_choices_of_one_prompt_share_its_pages_and_copy_the_last(
    smollm2_fp32: Driver, prompts: list[list[int]]
) -> None:
    driver, prompt = smollm2_fp32, prompts[19]
    expected = driver.generate([prompt], 8)[0]
    driver.reset()
    setup = driver.add_slots([0, 1, 2])
    first = driver.prefill({0: prompt}, fanout={0: [0, 1, 2]}, **setup).ids.tolist()
    assert first == [expected[0]] * 3
    num_full, last = divmod(len(prompt), driver.page_size)
    assert last > 0
    copies = {}
    for slot in (1, 2):
        driver.pages[slot] = driver.pages[0][:num_full]
        driver.lengths[slot] = len(prompt)
        copies[slot] = driver.grow({slot: len(prompt)})
    fields = {
        key: np.concatenate(
            [
                np.repeat(ints(1, 2), num_full)
                if key == "append_slots"
                else np.tile(np.arange(num_full, dtype=np.int32), 2)
                if key == "append_indices"
                else np.tile(ints(*driver.pages[0][:num_full]), 2),
                copies[1][key],
                copies[2][key],
            ]
        )
        for key in ("append_slots", "append_indices", "append_pages")
    }
    source = driver.pages[0][num_full]
    driver.run(**fields, copy_from=ints(source, source), copy_to=ints(driver.pages[1][-1], driver.pages[2][-1]))
    outputs = [[token] for token in first]
    for _ in range(7):
        for output, token in zip(outputs, driver.decode([0, 1, 2]).ids.tolist(), strict=True):
            output.append(token)
    assert outputs == [expected] * 3


@pytest.fixture(scope="module")
def seeded_output(_smollm2_drivers: dict[str, Driver], prompts: list[list[int]]) -> list[int]:
    """The tokens that a request with a seed gets when nothing else runs."""
    driver = _smollm2_drivers["bfloat16"]
    driver.reset()
    return driver.generate([prompts[1]], 32, temperature=1.0, seed=1234)[0]


@pytest.mark.parametrize("num_others", [1, 20])
def test_a_seeded_request_gives_the_same_text_alone_and_among_others(
    num_others: int, smollm2_bf16: Driver, prompts: list[list[int]], seeded_output: list[int]
) -> None:
    others = (prompts * 2)[2 : 2 + num_others]
    seeds = np.array([-1, 7] * len(others))[: len(others)]
    crowd = smollm2_bf16.generate([*others, prompts[1]], 32, temperature=1.0, seed=np.append(seeds, 1234))
    assert crowd[-1] == seeded_output
    assert len(set(seeded_output)) > 8


def test_a_step_without_rows_to_sample_answers_with_no_tokens(smollm2_fp32: Driver) -> None:
    tokens = smollm2_fp32.prefill({0: [5, 6, 7]}, fanout={})
    assert tokens.ids.size == 0
    assert smollm2_fp32.run().ids.size == 0
