"""One request to a running engine. `MODEL=<folder> pytest tests/test_basic.py::test_basic` takes another model."""

from __future__ import annotations

import os
from pathlib import Path

import openai

from tests.engine_process import EngineProcess


def test_basic(tmp_path: Path) -> None:
    arguments = [f"model={os.environ['MODEL']}"] if "MODEL" in os.environ else []
    with EngineProcess(tmp_path, *arguments) as engine:
        engine.wait_ready()
        client = openai.OpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0)
        model = client.models.list().data[0].id
        answer = client.completions.create(model=model, prompt="The capital of France is", max_tokens=16)
        assert answer.choices[0].text
        assert answer.usage is not None
        assert answer.usage.completion_tokens <= 16
