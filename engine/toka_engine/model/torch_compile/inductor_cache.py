"""Chooses the folder where torch.compile keeps its results, so that a second start finds them.

Imports nothing of torch: inductor makes its folder when it is imported, so the folder is chosen before.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from toka_engine.builtin import cache_dir
from toka_engine.model.folders import check_writable

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""The variable by which inductor is told its folder."""


def choose_compile_cache() -> None:
    """Unless the user has, choose a folder that outlives the process. Raises StorageError if it cannot be written."""
    folder = Path(os.environ.get(CACHE_VARIABLE) or cache_dir() / "torch_compile" / _name_machine())
    check_writable(folder, "the cache of torch_compile")
    os.environ[CACHE_VARIABLE] = str(folder)


def _name_machine() -> str:
    """Return eight hex digits for the CPU's model and features.

    Different machines may share a volume, and inductor compiles for its own without saying so in its keys.
    """
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split("\n\n", 1)[0]
    except OSError:
        first = ""
    kinds = ("model name", "flags", "CPU implementer", "CPU part", "Features")
    lines = [line for line in first.splitlines() if line.startswith(kinds)]
    return hashlib.sha256("\n".join([os.uname().machine, *lines]).encode()).hexdigest()[:8]
