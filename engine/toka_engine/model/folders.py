"""Folders that the worker and the build of kernels write into. Imports nothing heavy: an image layer copies this."""

from __future__ import annotations

import tempfile
from pathlib import Path

from toka_engine.errors import StorageError


def check_writable(folder: Path, meaning: str) -> None:
    """Make `folder` if it is missing. Raises StorageError, which names the folder by its path and its `meaning`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StorageError(f"{meaning} {folder} cannot be written: {error.strerror}") from error
