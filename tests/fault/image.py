"""The sources as the Dockerfile's stages that compile kernels see them, and processes in such a tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
_OTHERS = ("CC", "CUDA_", "FLASHINFER_", "TRITON_", "TOKA_KERNELS_DIR")
"""The variables of the environment that would decide a test beside what it sets itself."""

_WITHOUT_CHECKOUT = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
"""


def copy_stage(name: str, root: Path) -> None:
    """Put into `root` what a stage copies of the engine, and nothing else."""
    stage = re.search(rf"^FROM \S+ AS {name}$(.*?)^FROM ", (ROOT / "Dockerfile").read_text(), re.M | re.S)
    assert stage is not None
    for pattern, target in re.findall(r"^COPY (engine/\S+) /tmp/build/(\S+)$", stage[1], re.M):
        for source in ROOT.glob(pattern):
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, root / target, ignore=ignored, dirs_exist_ok=True)
            else:
                (root / target).mkdir(parents=True, exist_ok=True)
                shutil.copy(source, root / target)
    # Read at Python's start: an editable installation would find in the checkout what the copy lacks.
    (root / "sitecustomize.py").write_text(_WITHOUT_CHECKOUT)


def run(*arguments: str, source: Path = ROOT / "engine", **env: str | Path) -> subprocess.CompletedProcess[str]:
    """A Python process on the sources in `source`."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(_OTHERS)}
    whole = {**inherited, "PYTHONPATH": str(source), **{key: str(value) for key, value in env.items()}}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=whole, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
