"""docs/adding-a-model.md, followed: its blocks are put into a copy of the engine, which then serves its models.

Nothing here knows what the document adds but the two names that are asked for afterwards.
"""

from __future__ import annotations

import importlib.util
import os
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
from tokenizers import Tokenizer

from tests.engine_process import ROOT, EngineProcess

DOCUMENT = ROOT / "docs" / "adding-a-model.md"
MAX_LINES = 150
NUM_TOKENS = 12


def blocks_of(language: str) -> list[str]:
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"the document has no {language} block"
    return found


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a developer changes, with the document's steps done."""
    tree = tmp_path_factory.mktemp("tree")
    leave_out = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "engine" / "toka_engine", tree / "engine" / "toka_engine", ignore=leave_out)
    shutil.copytree(ROOT / "tests" / "model", tree / "tests" / "model", ignore=leave_out)
    for name in ("pyproject.toml", "tests/__init__.py", "tests/conftest.py", "tests/engine_process.py"):
        shutil.copy(ROOT / name, tree / name)
    for block in blocks_of("python"):
        path, _, text = block.removeprefix("# ").partition("\n")
        assert not (tree / path).exists(), f"{path} is there already"
        (tree / path).write_text(text)
    for block in blocks_of("diff"):
        subprocess.run(["git", "apply", "--recount", "-"], cwd=tree, input=block, text=True, check=True)
    return tree


def test_each_file_of_the_document_is_short_and_passes_the_linter(tree: Path) -> None:
    files = [block.removeprefix("# ").partition("\n")[0] for block in blocks_of("python")]
    assert all(len((tree / file).read_text().splitlines()) <= MAX_LINES for file in files)
    for command in (["check"], ["format", "--check"]):
        subprocess.run([sys.executable, "-m", "ruff", *command, *files], cwd=tree, check=True)


def test_the_documents_proof_passes_for_both_models(tree: Path) -> None:
    files = ["tests/model/test_logits.py", "tests/model/test_single_row.py"]
    command = [sys.executable, "-m", "pytest", *files, "-k", "gemma or mistral", "-v"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-5000:]
    assert re.findall(r"\[(\w+)\] PASSED", result.stdout) == ["gemma", "mistral"] * 2, result.stdout


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
    with pytest.raises(ModelInvalidError, match=r"sliding_window=16 is not supported \(null is\)"):
        module.Mistral(ModelBuilder(read_model_config(folder), None, None, SingleRank()))  # before it takes any weight
