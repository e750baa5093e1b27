"""The folder of files and batches: its lock, where a file's bytes lie, and how they get there and away.

data_dir/lock       held by the one engine that uses the folder
data_dir/toka.db    what there is (database.py)
data_dir/files/ID   the bytes of a file, under an id of ours: a client's name for it is never part of a path
data_dir/files/ID.part   an upload that is not complete
data_dir/lost/ID    bytes that the database does not know: what a crash left, or a damaged database has forgotten
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import time
from pathlib import Path

_PART = ".part"
_LOST_S = 7 * 86400
_MIN_DATABASE_BYTES = 100
"""SQLite takes a smaller file for a new database, or for none."""


class Folder:
    """The folder, once it is ours."""

    def __init__(self, root: Path, lock: int) -> None:
        self._root = root
        self._lock = lock

    @classmethod
    def take(cls, root: Path) -> Folder | None:
        """Make the folder where it is missing and lock it; None while another engine holds it. Raises OSError."""
        (root / "files").mkdir(parents=True, exist_ok=True)
        lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        return cls(root, lock)

    def release(self) -> None:
        os.close(self._lock)

    @property
    def database(self) -> Path:
        return self._root / "toka.db"

    def path_of(self, file_id: str) -> Path:
        """Return where the bytes of a file lie; `file_id` is one of ours."""
        return self._root / "files" / file_id

    def part_of(self, file_id: str) -> Path:
        """Return where the bytes of an upload lie until it is complete."""
        return self._root / "files" / (file_id + _PART)

    def free_bytes(self) -> int:
        return shutil.disk_usage(self._root).free

    def complete(self, file_id: str) -> None:
        """Give an upload, whose bytes are synced, its final name; it survives a power cut then."""
        self.part_of(file_id).rename(self.path_of(file_id))
        self.sync()

    def sync(self) -> None:
        """Sync the folder's entries."""
        fd = os.open(self._root / "files", os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def remove(self, file_id: str) -> None:
        self.path_of(file_id).unlink(missing_ok=True)
        self.part_of(file_id).unlink(missing_ok=True)

    def check_database(self) -> None:
        """Raise DatabaseError where the database has been emptied: it would open as a new one, without any file."""
        is_empty = self.database.is_file() and self.database.stat().st_size < _MIN_DATABASE_BYTES
        if is_empty and any(path.suffix != _PART for path in (self._root / "files").iterdir()):
            raise sqlite3.DatabaseError("toka.db is empty, though there are files")

    def sweep(self, known: set[str]) -> int:
        """Take away what belongs to no id in `known`: uploads and deletions that a crash cut short. Return how many.

        Whole files are kept for a week in the folder `lost`: a database that was damaged may have forgotten them.
        """
        lost = self._root / "lost"
        lost.mkdir(exist_ok=True)
        strays = [path for path in (self._root / "files").iterdir() if path.name not in known]
        for path in strays:
            if path.suffix == _PART:
                path.unlink(missing_ok=True)
            else:
                path.rename(lost / path.name)
                os.utime(lost / path.name)
        for path in lost.iterdir():
            if path.stat().st_mtime < time.time() - _LOST_S:
                path.unlink(missing_ok=True)
        return len(strays)
