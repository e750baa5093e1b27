"""docs/adding-a-sampling-parameter.md, followed: its blocks are put into a copy of the engine, which then serves it.

Nothing here knows what the document adds but the parameter's name and meaning.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import openai
import pytest

from tests.engine_process import EngineProcess
from tests.model.following import apply_diffs, copy_tree, run_tests

DOCUMENT = "adding-a-sampling-parameter.md"
NAME = "max_gap"
ALLOWED = ("slot_parameters.py", "server/", "model/cpu/sampler.py", "model/kernels/")
"""The table, the request and its limits, the samplers."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("tree")
    copy_tree(tree, "engine/toka_engine", "tests/model", "tests/unit")
    return tree


@pytest.fixture(scope="module")
def changed(tree: Path) -> list[str]:
    """Paths that the document changes in `tree`."""
    return apply_diffs(DOCUMENT, tree)


def test_the_table_the_request_and_the_samplers_are_all_that_changes(changed: list[str], tree: Path) -> None:
    engine = [path.removeprefix("engine/toka_engine/") for path in changed if path.startswith("engine/")]
    assert [path for path in engine if not path.startswith(ALLOWED)] == []
    assert len(engine) <= 6
    for command in (["check"], ["format", "--check"]):
        subprocess.run([sys.executable, "-m", "ruff", *command, *changed], cwd=tree, check=True)


@pytest.mark.slow
def test_the_documents_proof_passes_for_every_sampler_and_endpoint(changed: list[str], tree: Path) -> None:
    output = run_tests(tree, NAME, *(path for path in changed if path.startswith("tests/")))
    for file in ("tests/model/test_sampler.py", "tests/unit/kernels/", "tests/unit/server/"):
        assert any(line.startswith(file) and "PASSED" in line for line in output.splitlines()), output


@pytest.mark.slow
def test_the_parameter_of_the_document_is_served(changed: list[str], tree: Path, smollm2: Path, tmp_path: Path) -> None:
    settings = (f"model={smollm2}", "device=cpu", "dtype=float32", "kv_cache_num_tokens=4096", "num_threads=1")
    with EngineProcess(tmp_path, *settings, env={"PYTHONPATH": str(tree / "engine")}) as engine:
        engine.wait_ready()
        client = openai.OpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0, timeout=120.0)

        def sample(temperature: float, **extra: float) -> set[str]:
            answer = client.completions.create(
                model=smollm2.name,
                prompt="Once upon a time",
                max_tokens=12,
                n=4,
                temperature=temperature,
                extra_body=extra,
            )
            return {choice.text for choice in answer.choices}

        greedy = sample(0.0)
        assert sample(2.0) != greedy
        assert sample(2.0, **{NAME: 1e-6}) == greedy, "only the best token is left"
        with pytest.raises(openai.BadRequestError, match=NAME):
            sample(1.0, **{NAME: -1.0})
