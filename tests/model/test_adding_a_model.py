"""docs/adding-a-model.md, followed: its blocks are put into a copy of the engine, which then serves its models.

Nothing here knows what the document adds but the two names that are asked for afterwards.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from toka_engine.errors import ModelInvalidError
from toka_engine.model.builder import ModelBuilder
from toka_engine.model.model_config import read_model_config
from toka_engine.model.ranks import SingleRank
from toka_engine.model.stages import Stage
from tokenizers import Tokenizer

from tests.engine_process import EngineProcess
from tests.model.following import apply_diffs, blocks_of, copy_tree, run_tests

DOCUMENT = "adding-a-model.md"
MAX_LINES = 150
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a developer changes, with the document's steps done."""
    tree = tmp_path_factory.mktemp("tree")
    copy_tree(tree, "engine/toka_engine", "tests/model")
    for block in blocks_of(DOCUMENT, "python"):
        path, _, text = block.removeprefix("# ").partition("\n")
        assert not (tree / path).exists(), f"{path} is there already"
        (tree / path).write_text(text)
    apply_diffs(DOCUMENT, tree)
    return tree


def test_each_file_of_the_document_is_short_and_passes_the_linter(tree: Path) -> None:
    files = [block.removeprefix("# ").partition("\n")[0] for block in blocks_of(DOCUMENT, "python")]
    assert all(len((tree / file).read_text().splitlines()) <= MAX_LINES for file in files)
    for command in (["check"], ["format", "--check"]):
        subprocess.run([sys.executable, "-m", "ruff", *command, *files], cwd=tree, check=True)


@pytest.mark.slow
def test_the_documents_proof_passes_for_both_models(tree: Path) -> None:
    files = ["tests/model/test_logits.py", "tests/model/test_single_row.py"]
    output = run_tests(tree, "gemma or mistral", *files)
    assert re.findall(r"\[(\w+)\] PASSED", output) == ["gemma", "mistral"] * 2, output


def test_a_model_of_the_document_is_served_and_says_what_transformers_says(
    tree: Path, make_tiny: Callable[..., tuple[Any, Path]], smollm2: Path, tmp_path: Path
) -> None:
    serve_and_compare("F", tree, make_tiny, smollm2, tmp_path)


def serve_and_compare(
    torch_compile: str, tree: Path, make_tiny: Callable[..., tuple[Any, Path]], smollm2: Path, tmp_path: Path
) -> None:
    """Serve the document's Gemma; its answers are those of transformers."""
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    model, folder = make_tiny("Gemma", vocab_size=49152, head_dim=32)
    shutil.copy(smollm2 / "tokenizer.json", folder)
    prompt = "The document says how."
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    model.generation_config.eos_token_id = None
    output = model.generate(ids, max_new_tokens=NUM_TOKENS, do_sample=False)[0, ids.shape[1] :]
    settings = (f"model={folder}", "device=cpu", "dtype=float32", "kv_cache_num_tokens=4096", "num_threads=1")
    settings += (f"torch_compile={torch_compile}",)
    with EngineProcess(tmp_path, *settings, env={"PYTHONPATH": str(tree / "engine")}) as engine:
        engine.wait_ready()
        client = openai.OpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0, timeout=120.0)
        answer = client.completions.create(
            model=folder.name,
            prompt=prompt,
            max_tokens=NUM_TOKENS,
            temperature=0,
            n=2,
            extra_body={"ignore_eos": True},
        )
    assert {choice.text for choice in answer.choices} == {tokenizer.decode(output.tolist())}


def test_a_window_that_the_engine_has_not_is_refused_by_the_documents_mistral(
    tree: Path, make_tiny: Callable[..., tuple[Any, Path]]
) -> None:
    _, folder = make_tiny("Mistral", sliding_window=16)
    spec = importlib.util.spec_from_file_location(
        "mistral", tree / "engine" / "toka_engine" / "model" / "architectures" / "mistral.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = read_model_config(folder)
    build = ModelBuilder(config, None, None, SingleRank(), Stage.whole(config.num_layers))  # type: ignore[arg-type]
    with pytest.raises(ModelInvalidError, match=r"sliding_window=16 is not supported \(null is\)"):
        module.Mistral(build)  # before it takes any weight
