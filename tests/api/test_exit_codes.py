"""A model folder with a fault, or too little memory, decides the engine's exit code and its last words.

One case for each way in which the engine ends; every variant of a damaged file is in tests/model/test_loader.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from toka_engine.errors import REASONS, ExitCode

from tests.engine_process import ROOT, EngineProcess


@pytest.fixture
def broken_model(model_dir: Path, tmp_path: Path) -> Path:
    """The model's folder to be damaged: copies, but for the weights, which a test must replace and not change."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in model_dir.iterdir():
        if path.suffix == ".safetensors":
            try:
                os.link(path.resolve(), folder / path.name)
                continue
            except OSError:  # another file system
                pass
        shutil.copy(path, folder)
    return folder


def end_of(folder: Path, model: Path, *arguments: str) -> tuple[int, str]:
    with EngineProcess(folder, f"model={model}", "device=cpu", *arguments) as engine:
        return engine.wait_end(), engine.last_words()


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_without_config_is_invalid(broken_model: Path, tmp_path: Path) -> None:
    (broken_model / "config.json").unlink()
    code, words = end_of(tmp_path, broken_model)
    assert code == ExitCode.MODEL_INVALID
    assert "config.json" in words


def test_an_unknown_architecture_is_invalid_and_named(broken_model: Path, tmp_path: Path) -> None:
    edit_config(broken_model, architectures=["FancyForCausalLM"], model_type="fancy")
    code, words = end_of(tmp_path, broken_model)
    assert code == ExitCode.MODEL_INVALID
    assert "FancyForCausalLM" in words


def test_weights_of_another_shape_are_invalid_and_the_tensor_is_named(broken_model: Path, tmp_path: Path) -> None:
    edit_config(broken_model, intermediate_size=1024)
    code, words = end_of(tmp_path, broken_model)
    assert code == ExitCode.MODEL_INVALID
    assert "mlp" in words


def test_missing_weights_are_invalid(broken_model: Path, tmp_path: Path) -> None:
    (broken_model / "model.safetensors").unlink()
    code, words = end_of(tmp_path, broken_model)
    assert code == ExitCode.MODEL_INVALID
    assert "safetensors" in words


def test_truncated_weights_are_invalid_and_the_file_is_named(broken_model: Path, tmp_path: Path) -> None:
    weights = broken_model / "model.safetensors"
    with weights.open("rb") as whole:
        beginning = whole.read(10_000_000)
    weights.unlink()
    weights.write_bytes(beginning)
    code, words = end_of(tmp_path, broken_model)
    assert code == ExitCode.MODEL_INVALID
    assert "model.safetensors" in words


def test_a_folder_without_tokenizer_is_invalid(broken_model: Path, tmp_path: Path) -> None:
    (broken_model / "tokenizer.json").unlink()
    code, words = end_of(tmp_path, broken_model)
    assert code == ExitCode.MODEL_INVALID
    assert "tokenizer.json" in words


def test_a_kv_cache_larger_than_memory_is_out_of_memory(model_dir: Path, tmp_path: Path) -> None:
    code, words = end_of(tmp_path, model_dir, "kv_cache_num_tokens=(2**31 - 1)")
    assert code == ExitCode.OUT_OF_MEMORY, words
    assert len(words.splitlines()) == 1
    assert "2147483648 tokens" in words  # whole pages
    assert "kv_cache_num_tokens may be up to" in words


def test_weights_larger_than_memory_are_out_of_memory_before_they_are_read(broken_model: Path, tmp_path: Path) -> None:
    """A file of 4.3 TB, of which the disk holds the header alone."""
    num_tokens, hidden_size = 2**24, 2**16
    edit_config(broken_model, vocab_size=num_tokens, hidden_size=hidden_size, head_dim=64)
    num_bytes = 4 * num_tokens * hidden_size
    entry = {"dtype": "F32", "shape": [num_tokens, hidden_size], "data_offsets": [0, num_bytes]}
    header = json.dumps({"model.embed_tokens.weight": entry}).encode()
    weights = broken_model / "model.safetensors"
    weights.unlink()
    with weights.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + num_bytes)
    code, words = end_of(tmp_path, broken_model, "dtype=bfloat16")
    assert code == ExitCode.OUT_OF_MEMORY, words
    assert len(words.splitlines()) == 1
    assert f"model={broken_model}: the weights take 2199.0 GB as dtype=bfloat16" in words


def test_a_gpu_that_is_not_there_is_unavailable(model_dir: Path, tmp_path: Path) -> None:
    with EngineProcess(tmp_path, f"model={model_dir}", "device=cuda", env={"CUDA_VISIBLE_DEVICES": ""}) as engine:
        assert engine.wait_end() == ExitCode.DEVICE_UNAVAILABLE
        assert engine.last_words().startswith("DeviceUnavailable: ")


def test_a_taken_port_ends_the_second_engine(model_dir: Path, tmp_path: Path, engine: EngineProcess) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "toka_engine", f"model={model_dir}", "host=127.0.0.1", f"port={engine.port}"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "engine")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == ExitCode.PORT_IN_USE
    assert engine.get("/readyz") == 200


def test_the_operator_knows_every_code_by_the_same_reason() -> None:
    script = "import json; from toka_operator.errors import EXIT_REASONS; print(json.dumps(EXIT_REASONS))"
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT / "operator")},
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = {int(code): reason for code, reason in json.loads(result.stdout).items()}
    assert theirs == {int(code): reason for code, reason in REASONS.items()}
