"""Downloads a model's files from the Hugging Face hub: once per cache, visibly, and so that no byte is fetched twice.

Only what the engine reads is fetched: top-level safetensors, JSON and chat templates; nothing of a repository is ever
run. huggingface_hub says what there is, speaks HTTP, lays out the cache (HF_HOME) and reads HF_TOKEN, HF_ENDPOINT and
HF_HUB_OFFLINE. Ours are the lock on the cache (`cache`), files that outlive a killed process and are checked by their
hashes (`files`), the progress (`progress`), the retries of the whole, and the translation of the library's errors
(`failures`). Runs in the resolving process and in `toka-download`, never in the supervisor.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from toka_engine.errors import ConfigError, HubUnavailableError
from toka_engine.hub.cache import Attempts, ModelCache, Snapshot
from toka_engine.hub.failures import TransientError, is_offline, storage_errors, translated_errors
from toka_engine.hub.files import check_space, fetch_files, list_files
from toka_engine.hub.progress import Report, TakeTransfer, Transfer, reporting

__all__ = ["TOKENIZER", "WEIGHTS", "Report", "TakeTransfer", "Transfer", "check_space", "download"]

WEIGHTS = ("*.safetensors", "*.json", "*.jinja")
TOKENIZER = ("*.json", "*.jinja")

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_MAX_ATTEMPTS = 6
_FIRST_PAUSE_S, _MAX_PAUSE_S = 1.0, 30.0


def download(
    name: str,
    revision: str | None,
    patterns: tuple[str, ...],
    report: Report,
    *,
    max_age_s: float = 0.0,
    on_transfer: TakeTransfer = lambda transfer: None,
) -> Path:
    """Return the folder with the files of the hub model `name` that match `patterns`, complete.

    A snapshot that was complete less than `max_age_s` ago is taken as it is: the hub is not asked whether the branch
    has moved. Raises ConfigError, ModelNotFoundError, ModelAuthError, HubUnavailableError or StorageError.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"model={name}: neither a folder nor a hub name (org/name)")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when the library is imported
    cache, wanted = ModelCache.find(name), Snapshot(name, revision or "main", patterns)
    with storage_errors(), cache.locked(report):
        if folder := cache.find_recent(wanted, max_age_s):
            return folder
        attempts = cache.read_attempts()
        if (pause_s := attempts.pause_s(time.time())) and not is_offline():
            report(f"the hub gave no answer, {attempts.num_failed} starts in a row; again in {pause_s:.0f} s")
            time.sleep(pause_s)
        try:
            folder = _download_with_retries(cache, wanted, report, on_transfer)
        except HubUnavailableError:
            cache.write_attempts(attempts.add_failure(time.time()))
            raise
        cache.write_attempts(Attempts())
        cache.note_complete(wanted, folder, time.time())
        return folder


def _download_with_retries(cache: ModelCache, wanted: Snapshot, report: Report, on_transfer: TakeTransfer) -> Path:
    for attempt in range(1, _MAX_ATTEMPTS + 1):
        try:
            with translated_errors(wanted.name, wanted.revision):
                return _download_once(cache, wanted, report, on_transfer)
        except TransientError as error:
            if attempt == _MAX_ATTEMPTS:
                raise HubUnavailableError(f"cannot download {wanted.name}: {error}") from error
            pause_s = max(min(_MAX_PAUSE_S, _FIRST_PAUSE_S * 2 ** (attempt - 1)), error.retry_after_s)
            report(f"attempt {attempt} of {_MAX_ATTEMPTS} failed ({error}); again in {pause_s:.0f} s")
            time.sleep(pause_s)
    raise AssertionError("unreachable")


def _download_once(cache: ModelCache, wanted: Snapshot, report: Report, on_transfer: TakeTransfer) -> Path:
    from huggingface_hub import snapshot_download

    commit, files = list_files(wanted, may_be_cached=cache.has_snapshots())
    if commit is not None:
        missing = [file for file in files if not cache.has(file.blob_name)]
        cache.remove_leftovers({file.blob_name for file in files})
        num_bytes = sum(file.num_bytes for file in missing) - sum(cache.size_of_part(f.blob_name) for f in missing)
        check_space(num_bytes, cache.folder)
        with reporting(cache, files, is_needed=bool(missing), report=report, on_transfer=on_transfer):
            fetch_files(cache, wanted.name, commit, missing)
        cache.link_files(commit, {file.name: file.blob_name for file in files})
        cache.write_ref(wanted.revision, commit)
    # Whatever lies in the cache is confirmed, or fetched, by the library itself: files that plain HTTP cannot have
    # (over 50 GB), a cache that another program filled, a hub that is away.
    folder = snapshot_download(
        wanted.name,
        revision=commit or wanted.revision,
        allow_patterns=list(wanted.patterns),
        ignore_patterns=list(wanted.NEVER),
    )
    return Path(str(folder))
