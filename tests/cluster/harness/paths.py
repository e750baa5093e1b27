"""The harness's files: a cache of built commands and images, a folder per running cluster."""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
TOOL_MODULES = Path(__file__).resolve().parent / "tools"


def cluster_cache() -> Path:
    """The folder that survives a cluster: built commands, images, the registry's blobs."""
    base = os.environ.get("TOKA_CACHE_DIR") or str(Path.home() / ".cache" / "toka")
    return Path(base) / "cluster"


def bin_folder() -> Path:
    """Where the built commands lie."""
    return cluster_cache() / "bin"


def run_root() -> Path:
    """The parent of every cluster's own folder."""
    return cluster_cache() / "run"


def tool(name: str) -> str:
    """The path of a built command; it need not exist yet."""
    return str(bin_folder() / name)
