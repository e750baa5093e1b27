"""A start that finds its Triton kernels built compiles none: no compiler in reach, no cache to write to."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from tests.gpu.test_parity import drive, make

ROOT = Path(__file__).parents[2]

BUILD = """
import sys
from pathlib import Path
from toka_engine.model.aot.triton_build import build
from toka_engine.model.model_config import read_model_config
build(Path(sys.argv[1]), int(sys.argv[3]), [(read_model_config(Path(sys.argv[2])), 16)])
"""

START = """
import logging, sys
from pathlib import Path
from tests.gpu.test_parity import drive
logging.basicConfig(level="INFO")
drive(Path(sys.argv[2]))
"""


def run(code: str, *arguments: object, **env: str | Path) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if key != "CC" and not key.startswith("TRITON_")}
    path = f"{ROOT / 'engine'}:{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    whole = {**inherited, "PYTHONPATH": path, **{key: str(env[key]) for key in env}}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=whole, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def test_a_start_with_built_kernels_compiles_nothing(tmp_path: Path) -> None:
    make("Qwen3", tmp_path / "model")
    drive(tmp_path / "model")  # flashinfer's kernels are in its own cache now
    major, minor = torch.cuda.get_device_capability()
    paths = tmp_path / "kernels", tmp_path / "model", 10 * major + minor
    built = run(BUILD, *paths)
    assert built.returncode == 0, built.stderr
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    (tmp_path / "file").touch()
    started = run(
        START,
        *paths,
        PATH=nothing,
        CUDA_HOME=nothing,
        TRITON_CACHE_DIR=tmp_path / "file" / "cache",
        TOKA_KERNELS_DIR=tmp_path / "kernels",
    )
    assert started.returncode == 0, started.stderr
    ready = re.search(r"event=triton_kernels_ready built=(\d+) compiled=0 modules_compiled=0\n", started.stderr)
    assert ready is not None, started.stderr
    assert int(ready[1]) >= 25
