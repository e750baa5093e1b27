"""Combinations of dp_size, pp_size and tp_size up to 8 workers on CPU ranks: the texts of one process, greedy and
seeded.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
import torch
from toka_engine.builtin import ensure_builtin
from toka_engine.config import MAX_RANKS
from tokenizers import Tokenizer

from tests.engine_process import EngineProcess
from tests.model.conftest import TINY

NUM_TOKENS = 8
PROMPTS = ("The sea was calm.", "Two ranks", "Once upon a time there was a keeper of a lighthouse who", "1, 2, 3,")
SHAPES: dict[str, dict[str, int]] = {
    "Llama": {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 9},
    "Qwen2": {
        "num_attention_heads": 12,
        "num_key_value_heads": 6,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
    },
    "Qwen3": {
        "num_attention_heads": 70,
        "num_key_value_heads": 70,
        "head_dim": 8,
        "intermediate_size": 280,
        "num_hidden_layers": 4,
    },
}
TP_SIZES = {"Llama": (1, 2, 4, 8), "Qwen2": (2, 3, 6), "Qwen3": (2, 5, 7)}
"""The numbers of ranks that can split the family's heads. With more than two, ranks of the Llama share KV heads."""


PP_SIZES = {"Llama": (1, 2, 3, 4, 8), "Qwen2": (1, 2, 3), "Qwen3": (1, 2, 4)}
"""The numbers of stages that are tried; a family's layers cannot be dealt out evenly to most of them."""


class Case(NamedTuple):
    """A model folder, and the texts of one process for PROMPTS: greedy, and three seeded ones of each."""

    folder: Path
    greedy: list[str]
    seeded: list[list[str]]


@contextmanager
def running(folder: Path, root: Path, dp_size: int = 1, pp_size: int = 1, tp_size: int = 1) -> Iterator[EngineProcess]:
    root.mkdir(exist_ok=True)
    common = (f"model={folder}", "served_model_name=m", "device=cpu", "dtype=float32", "kv_cache_num_tokens=2048")
    sizes = (f"dp_size={dp_size}", f"pp_size={pp_size}", f"tp_size={tp_size}", "num_threads=1")
    with EngineProcess(root, *common, *sizes) as engine:
        engine.wait_for_log("logger=toka.supervisor event=ready", timeout_s=600.0)
        yield engine


def ask_all(engine: EngineProcess) -> tuple[list[str], list[list[str]]]:
    """The greedy texts and the seeded ones, all asked at the same time."""
    with openai.OpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0, timeout=300.0) as client:

        def ask(prompt: str, **fields: Any) -> list[str]:
            answer = client.completions.create(
                model="m", prompt=prompt, max_tokens=NUM_TOKENS, extra_body={"ignore_eos": True}, **fields
            )
            return [choice.text for choice in answer.choices]

        with ThreadPoolExecutor(2 * len(PROMPTS)) as pool:
            greedy = [pool.submit(ask, prompt, temperature=0) for prompt in PROMPTS]
            seeded = [pool.submit(ask, prompt, temperature=1, seed=7, n=3) for prompt in PROMPTS]
            return [future.result()[0] for future in greedy], [future.result() for future in seeded]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """A model of each family, and what one process says, whose greedy texts are those of transformers."""
    return {family: make_case(family, tmp_path_factory.mktemp(family)) for family in SHAPES}


def make_case(family: str, root: Path) -> Case:
    import transformers

    torch.manual_seed(7)
    config = getattr(transformers, f"{family}Config")(**{**TINY, "vocab_size": 49152, **SHAPES[family]})
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    model.generation_config.eos_token_id = None
    folder = root / "model"
    model.save_pretrained(folder)
    shutil.copy(ensure_builtin() / "tokenizer.json", folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        found = model.generate(ids, max_new_tokens=NUM_TOKENS, do_sample=False)
        expected.append(tokenizer.decode(found[0, ids.shape[1] :].tolist()))
    with running(folder, root / "one") as engine:
        greedy, seeded = ask_all(engine)
    assert greedy == expected
    return Case(folder, greedy, seeded)


@pytest.mark.parametrize(
    ("family", "dp_size", "pp_size", "tp_size"),
    [
        (family, dp_size, pp_size, tp_size)
        for family, tp_sizes in TP_SIZES.items()
        for pp_size in PP_SIZES[family]
        for tp_size in {1, *tp_sizes}
        for dp_size in (range(1, MAX_RANKS + 1) if pp_size == 1 else (1, 2))
        if 1 < dp_size * pp_size * tp_size <= MAX_RANKS and (pp_size > 1 or tp_size in tp_sizes)
    ],
)
def test_every_combination_says_what_one_process_says(
    cases: dict[str, Case], tmp_path: Path, family: str, dp_size: int, pp_size: int, tp_size: int
) -> None:
    case = cases[family]
    with running(case.folder, tmp_path, dp_size, pp_size, tp_size) as engine:
        assert sum(name.startswith("model") for name in engine.children) == dp_size * pp_size * tp_size
        assert ask_all(engine) == (case.greedy, case.seeded)
