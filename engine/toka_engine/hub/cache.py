"""A model's folder in the hub's cache, in the layout of huggingface_hub, and what we keep beside it.

Owns: the lock that makes one process of all that share the cache download (`flock`, which also works over NFSv4, and
which the kernel gives up with its holder), names of whole and partial files, and a small file of notes: since when
a snapshot is known to be complete, and how often in a row the hub was unreachable, so that restarts do not hammer it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from toka_engine.hub.progress import Report

_PART = ".part"
_LEFTOVER_AFTER_S = 86400.0
"""Partial files that no commit of ours needs, and nobody has written to for so long, are removed."""
_LOCK_POLL_S, _LOCK_REPORT_S = 0.2, 10.0
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 15.0, 300.0
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Files of one revision that match `patterns`."""

    NEVER: ClassVar[tuple[str, ...]] = ("*/*", "consolidated*.safetensors")
    """Subfolders hold other formats; consolidated files repeat the weights in the vendor's own naming."""

    name: str
    revision: str
    patterns: tuple[str, ...]

    @property
    def key(self) -> str:
        return " ".join((self.revision, *self.patterns))


@dataclass(frozen=True, slots=True)
class Attempts:
    """Starts in a row at which the hub gave no answer."""

    num_failed: int = 0
    failed_at: float = 0.0

    def add_failure(self, now: float) -> Attempts:
        return Attempts(self.num_failed + 1, now)

    def pause_s(self, now: float) -> float:
        """Return the seconds to wait before the hub is asked again, whichever node's clock noted the failure."""
        if not self.num_failed:
            return 0.0
        backoff_s = min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2.0 ** min(self.num_failed - 1, 10))
        return min(backoff_s, max(0.0, self.failed_at + backoff_s - now))


class ModelCache:
    """The files of one model."""

    def __init__(self, root: Path, repository: str) -> None:
        """`repository` is the library's name for the model's folder."""
        self.folder = root / repository
        self._blobs = self.folder / "blobs"
        self._notes_folder = root / ".locks" / repository
        self._is_read_only = False

    @classmethod
    def find(cls, name: str) -> ModelCache:
        """Return the cache of the hub model `name`."""
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        return cls(Path(constants.HF_HUB_CACHE), repo_folder_name(repo_id=name, repo_type="model"))

    # ------------------------------------------------------------ the lock

    @contextlib.contextmanager
    def locked(self, report: Report) -> Iterator[None]:
        """Hold the lock of this model; a cache that we may not write to has none, and needs none."""
        try:
            self._notes_folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._notes_folder / "toka.lock", os.O_RDWR | os.O_CREAT, 0o664)
        except OSError as error:
            if error.errno not in _READ_ONLY or not self.folder.is_dir():
                raise
            self._is_read_only = True
            yield
            return
        try:
            self._wait_for(descriptor, report)
            yield
        finally:
            os.close(descriptor)

    def _wait_for(self, descriptor: int, report: Report) -> None:
        """Take the lock. A wait for it is told of every few seconds: another engine downloads, or is stuck."""
        started_at, next_report = time.monotonic(), 0.0
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    report("the file system of the cache has no locks: engines that start together may all download")
                    return
                raise
            waited_s = time.monotonic() - started_at
            if waited_s >= next_report:
                next_report = waited_s + _LOCK_REPORT_S
                report(f"another engine downloads into this cache; waited {waited_s:.0f} s")
            time.sleep(_LOCK_POLL_S)

    # ------------------------------------------------------------ files

    def has(self, blob_name: str) -> bool:
        return (self._blobs / blob_name).exists()

    def has_snapshots(self) -> bool:
        """Whether something was downloaded before."""
        return (self.folder / "snapshots").is_dir()

    def part_path(self, blob_name: str) -> Path:
        self._blobs.mkdir(parents=True, exist_ok=True)
        return self._blobs / (blob_name + _PART)

    def size_of_part(self, blob_name: str) -> int:
        return _size(self._blobs / (blob_name + _PART))

    def count_bytes(self, blob_name: str) -> int:
        """Return the bytes of a file that are there, whole or in part."""
        return _size(self._blobs / blob_name) or self.size_of_part(blob_name)

    def accept_part(self, blob_name: str) -> None:
        """Give a complete file its name."""
        try:
            os.replace(self._blobs / (blob_name + _PART), self._blobs / blob_name)
        except FileNotFoundError:
            if not self.has(blob_name):  # a process on another node, that no lock of ours stops, was first
                raise

    def link_files(self, commit: str, blobs: Mapping[str, str]) -> None:
        """Show whole files under their names in a commit's snapshot."""
        folder = self.folder / "snapshots" / commit
        for name, blob_name in blobs.items():
            link = folder / name
            if not self.has(blob_name) or link.exists():
                continue
            folder.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            try:
                link.symlink_to(Path("..") / ".." / "blobs" / blob_name)
            except OSError as error:
                if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                    os.link(self._blobs / blob_name, link)  # a file system without symbolic links
                elif not link.exists():
                    raise

    def write_ref(self, revision: str, commit: str) -> None:
        """Note which commit a branch or tag is at, for starts without a hub."""
        if revision == commit or self._is_read_only:
            return
        path = self.folder / "refs" / revision
        if not path.is_file() or path.read_text() != commit:
            _write_atomically(path, commit)

    def remove_leftovers(self, wanted: Set[str]) -> None:
        """Remove what killed processes left and nobody will go on with."""
        if not self._blobs.is_dir() or self._is_read_only:
            return
        for entry in os.scandir(self._blobs):
            name, _, suffix = entry.name.partition(".")
            is_partial = suffix.endswith("incomplete") or (suffix == _PART[1:] and name not in wanted)
            with contextlib.suppress(FileNotFoundError):
                if is_partial and entry.stat().st_mtime < time.time() - _LEFTOVER_AFTER_S:
                    os.unlink(entry.path)

    # ------------------------------------------------------------ notes

    def find_recent(self, wanted: Snapshot, max_age_s: float) -> Path | None:
        """Return the folder of a snapshot that was complete less than `max_age_s` ago."""
        note = self._read_notes().get("complete", {}).get(wanted.key, {})
        try:
            folder, age_s = self.folder / "snapshots" / str(note["commit"]), time.time() - float(note["at"])
        except (KeyError, TypeError, ValueError):
            return None
        is_whole = all((folder / str(file)).is_file() for file in note.get("files", ["?"]))
        return folder if 0.0 <= age_s < max_age_s and is_whole else None

    def note_complete(self, wanted: Snapshot, folder: Path, now: float) -> None:
        """Note that the snapshot in `folder` has all its files."""
        files = sorted(path.name for path in folder.iterdir())
        notes = self._read_notes()
        complete = notes.setdefault("complete", {})
        complete[wanted.key] = {"commit": folder.name, "at": now, "files": files}
        self._write_notes(notes)

    def read_attempts(self) -> Attempts:
        note = self._read_notes().get("failed", {})
        try:
            return Attempts(int(note["count"]), float(note["at"]))
        except (KeyError, TypeError, ValueError):
            return Attempts()

    def write_attempts(self, attempts: Attempts) -> None:
        notes = self._read_notes()
        if attempts != self.read_attempts():
            notes["failed"] = {"count": attempts.num_failed, "at": attempts.failed_at}
            self._write_notes(notes)

    def _read_notes(self) -> dict[str, Any]:
        try:
            notes = json.loads((self._notes_folder / "toka.json").read_text())
        except (OSError, ValueError):
            return {}
        return notes if isinstance(notes, dict) else {}

    def _write_notes(self, notes: dict[str, Any]) -> None:
        if not self._is_read_only:
            _write_atomically(self._notes_folder / "toka.json", json.dumps(notes))


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
