"""This module finds the embedded default model. It imports nothing heavy: `entry` asks before any process loads torch.

The image ships the converted folder (TOKA_BUILTIN_DIR); elsewhere it is converted once, in a process of its own, into
the cache folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from toka_engine.errors import StorageError

NAME = "smollm2"


def cache_dir() -> Path:
    """TOKA_CACHE_DIR, by default ~/.cache/toka."""
    configured = os.environ.get("TOKA_CACHE_DIR")
    return Path(configured) if configured else Path.home() / ".cache" / "toka"


def find_builtin() -> Path | None:
    """The folder of the converted model if it is there already."""
    shipped = os.environ.get("TOKA_BUILTIN_DIR")
    candidates = ([Path(shipped) / NAME] if shipped else []) + [cache_dir() / "models" / NAME]
    return next((folder for folder in candidates if (folder / "config.json").exists()), None)


def ensure_builtin() -> Path:
    """The folder of the embedded model; the first use converts it (about half a minute). Raises StorageError."""
    found = find_builtin()
    if found is not None:
        return found
    folder = cache_dir() / "models" / NAME
    command = [sys.executable, "-m", "toka_engine.convert_builtin", str(folder)]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if result.returncode != 0 or not (folder / "config.json").exists():
        lines = result.stderr.strip().splitlines() or ["no reason given"]
        raise StorageError(f"cannot convert the embedded model into {folder}: {lines[-1]}")
    return folder
