"""Downloads a model's files from the Hugging Face hub, visibly and so that a cut connection costs nothing.

Only what the engine reads is fetched: top-level safetensors, JSON and chat templates; nothing of a repository is ever
run. huggingface_hub keeps the cache (HF_HOME), resumes files by Range and reads HF_TOKEN, HF_ENDPOINT and
HF_HUB_OFFLINE; here are the retries of the whole, the progress, and the translation of its errors into ours. Runs in
the resolving process and in `toka-download`, never in the supervisor.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from toka_engine.errors import (
    ConfigError,
    HubUnavailableError,
    ModelAuthError,
    ModelNotFoundError,
    StorageError,
    TokaError,
)

Report = Callable[[str], None]
"""Takes one line of progress."""

WEIGHTS = ("*.safetensors", "*.json", "*.jinja")
TOKENIZER = ("*.json", "*.jinja")
_NEVER = ("*/*", "consolidated*.safetensors")
"""Subfolders hold other formats; consolidated files repeat the weights in the vendor's own naming."""

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_MAX_ATTEMPTS = 6
_FIRST_PAUSE_S, _MAX_PAUSE_S = 1.0, 30.0
_REPORT_INTERVAL_S = 2.0
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


def download(name: str, revision: str | None, patterns: tuple[str, ...], report: Report) -> Path:
    """Return the folder with the files of the hub model `name` that match `patterns`, complete.

    Raises ConfigError, ModelNotFoundError, ModelAuthError, HubUnavailableError or StorageError.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"model={name}: neither a folder nor a hub name (org/name)")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when the library is imported
    for attempt in range(1, _MAX_ATTEMPTS + 1):
        try:
            return _download_once(name, revision, patterns, report)
        except _TransientError as error:
            if attempt == _MAX_ATTEMPTS:
                raise HubUnavailableError(f"cannot download {name}: {error}") from error
            pause_s = min(_MAX_PAUSE_S, _FIRST_PAUSE_S * 2 ** (attempt - 1))
            report(f"attempt {attempt} of {_MAX_ATTEMPTS} failed ({error}); again in {pause_s:.0f} s")
            time.sleep(pause_s)
    raise AssertionError("unreachable")


class _TransientError(Exception):
    """Worth another attempt: the connection, or the hub's own trouble."""


def _download_once(name: str, revision: str | None, patterns: tuple[str, ...], report: Report) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.file_download import repo_folder_name

    blobs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "blobs"
    with _translated_errors(name, revision):
        num_bytes = _missing_bytes(name, revision, patterns)
        check_space(num_bytes, Path(constants.HF_HUB_CACHE))
        with _reporting(blobs, num_bytes, report):
            folder = snapshot_download(
                name, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(_NEVER)
            )
    return Path(str(folder))


def _missing_bytes(name: str, revision: str | None, patterns: tuple[str, ...]) -> int | None:
    """Return how many bytes there are to fetch; None where the hub cannot be asked (the cache may do)."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    try:
        files = snapshot_download(
            name, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(_NEVER), dry_run=True
        )
    except DryRunError:
        return None
    return sum(file.file_size or 0 for file in files if file.will_download)


def check_space(num_bytes: int | None, cache: Path) -> None:
    """Raise StorageError if `num_bytes` more do not fit where `cache` is or will be."""
    folder = next((one for one in (cache, *cache.parents) if one.exists()), Path("/"))
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    if num_bytes is not None and num_bytes > free:
        raise StorageError(f"{folder} has {_gigabytes(free)} free, the download takes {_gigabytes(num_bytes)}")


@contextmanager
def _reporting(blobs: Path, num_bytes: int | None, report: Report) -> Iterator[None]:
    """Report bytes and rate every few seconds from what lies on the disk, whichever way the library fetches it."""
    if not num_bytes:
        yield
        return
    before, started_at, is_done = _size_of(blobs), time.monotonic(), threading.Event()

    def line() -> str:
        fetched, seconds = _size_of(blobs) - before, max(1e-3, time.monotonic() - started_at)
        return f"{_gigabytes(fetched)} of {_gigabytes(num_bytes)}, {fetched / seconds / 1e6:.1f} MB/s"

    def watch() -> None:
        while not is_done.wait(_REPORT_INTERVAL_S):
            report(line())

    report(f"0 of {_gigabytes(num_bytes)}")
    watcher = threading.Thread(target=watch, name="progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_done.set()
        watcher.join()
    report(line())


def _size_of(folder: Path) -> int:
    total = 0
    try:
        for entry in os.scandir(folder):
            total += entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:
        return total  # not there yet, or a part was renamed while we looked
    return total


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"


@contextmanager
def _translated_errors(name: str, revision: str | None) -> Iterator[None]:
    """Turn whatever huggingface_hub raises into an error of our tree, or into `_TransientError`."""
    from huggingface_hub import errors

    try:
        yield
    except TokaError:
        raise
    except errors.HFValidationError as error:
        raise ConfigError(f"model={name}: not a hub name") from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(f"the hub has no revision {revision!r} of {name}") from error
    except errors.LocalEntryNotFoundError as error:
        _raise_for_unreachable(name, error)
    except errors.HfHubHTTPError as error:
        _raise_for_status(name, error.response.status_code, error)
    except errors.HTTPError as error:  # type: ignore[attr-defined]  # of whichever HTTP client the library uses
        raise _TransientError(f"the connection failed: {type(error).__name__}") from error
    except OSError as error:
        _raise_for_os_error(error)


def _raise_for_unreachable(name: str, error: Exception) -> None:
    """The library looked into the cache because the hub could not be asked, and the cache has not all of it."""
    from huggingface_hub import constants, errors

    cause = error.__cause__
    if constants.is_offline_mode():
        raise ModelNotFoundError(f"{name} is not (wholly) in the cache, and HF_HUB_OFFLINE is set") from error
    if isinstance(cause, errors.HfHubHTTPError):
        _raise_for_status(name, cause.response.status_code, error)
    raise _TransientError(f"the hub cannot be reached: {type(cause or error).__name__}") from error


def _raise_for_status(name: str, status: int, error: Exception) -> None:
    if status in (401, 403):
        token = "HF_TOKEN was refused" if os.environ.get("HF_TOKEN") else "no HF_TOKEN is set"
        raise ModelAuthError(f"the hub answers {status} for {name}: not public or not there, and {token}") from error
    if status in (404, 410):
        raise ModelNotFoundError(f"the hub has no model {name}") from error
    if status in (408, 429) or status >= 500:
        raise _TransientError(f"the hub answers {status}") from error
    raise HubUnavailableError(f"the hub answers {status} for {name}") from error


def _raise_for_os_error(error: OSError) -> None:
    if error.errno in _NO_SPACE:
        raise StorageError(f"the disk is full: {error}") from error
    # Without a number: the library's own check that a file has the size it should have.
    if error.errno is None or isinstance(error, ConnectionError | TimeoutError):
        raise _TransientError(f"{type(error).__name__}: {error}") from error
    raise StorageError(f"the cache cannot be written: {error}") from error
