"""Makes the folder where the ranks of an engine find each other while it starts, and clears away what others left.

The folder is for this user alone, new for each start, and locked while it is in use: one that nobody has locked was
left by a supervisor that was killed, and the next start removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

from toka_engine.errors import StorageError

_PREFIX = "toka-ranks-"
_YOUNG_S = 60.0
"""A folder may be so old before it must be locked by its owner."""


class Rendezvous:
    """A folder of mode 0700."""

    def __init__(self) -> None:
        """Make it under TMPDIR. Raises StorageError."""
        try:
            _sweep(Path(tempfile.gettempdir()))
            self.folder = tempfile.mkdtemp(prefix=_PREFIX)
            self._lock = os.open(self.folder, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StorageError(f"no folder can be made for the ranks to find each other: {error}") from error

    def remove(self) -> None:
        """Remove it; harmless when that has been done."""
        if self._lock >= 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def _sweep(root: Path) -> None:
    """Remove the folders of this user that supervisors have left."""
    for folder in root.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            if status.st_uid == os.getuid() and time.time() - status.st_mtime > _YOUNG_S:
                _remove_unlocked(folder)


def _remove_unlocked(folder: Path) -> None:
    lock = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)
