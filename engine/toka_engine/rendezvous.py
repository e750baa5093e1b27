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
from pathlib import Path

from toka_engine.errors import StorageError

_PREFIX = "toka-ranks-"
_NUM_TRIALS = 100


class Rendezvous:
    """A folder of mode 0700."""

    def __init__(self) -> None:
        """Make it under TMPDIR. Raises StorageError."""
        try:
            _sweep(Path(tempfile.gettempdir()))
            self.folder, self._lock = _make_locked()
        except OSError as error:
            raise StorageError(f"no folder can be made for the ranks to find each other: {error}") from error

    def remove(self) -> None:
        """Remove it; harmless when that has been done."""
        if self._lock >= 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def _make_locked() -> tuple[str, int]:
    """Return a new folder and the descriptor that locks it. Another start may take one away before it is locked."""
    for _ in range(_NUM_TRIALS):
        folder = tempfile.mkdtemp(prefix=_PREFIX)
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            if (lock := _lock(folder)) is not None:
                return folder, lock
    raise FileNotFoundError(f"new folders in {tempfile.gettempdir()} are removed at once")


def _lock(folder: str | Path) -> int | None:
    """Return a descriptor that locks `folder`; None if it has been removed meanwhile. Raises OSError."""
    lock = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.stat(folder), os.fstat(lock)):
            return lock
    except OSError:
        os.close(lock)
        raise
    os.close(lock)
    return None


def _sweep(root: Path) -> None:
    """Remove the folders of this user that supervisors have left."""
    for folder in root.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.lstat().st_uid == os.getuid() and (lock := _lock(folder)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)
