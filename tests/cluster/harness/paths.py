"""The harness's files: a cache of built commands and images, a folder per running cluster."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
TOOL_MODULES = Path(__file__).resolve().parent / "tools"


def cluster_cache() -> Path:
    """The folder that survives a cluster: built commands, images, the registry's blobs."""
    base = os.environ.get("TOKA_CACHE_DIR") or str(Path.home() / ".cache" / "toka")
    return Path(base) / "cluster"


def bin_folder() -> Path:
    """The folder in which the built commands lie."""
    return cluster_cache() / "bin"


def run_root() -> Path:
    """The parent of every cluster's own folder."""
    return cluster_cache() / "run"


def tool(name: str) -> str:
    """The path of a built command; it need not exist yet."""
    return str(bin_folder() / name)


@contextmanager
def only_one(lock_file: Path) -> Iterator[None]:
    """Wait until no other process holds this lock, and hold it: sessions of tests share the cache."""
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    with lock_file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
