"""The files of a model: which there are, by the hub's own listing, and how each comes into the cache whole.

A file is written under its blob's name with `.part` behind it, from where a killed process left off; its size and its
hash are compared with the hub's before it gets its name. So a file with its name is right, and no reader sees part of
one. Without a lock that all nodes respect (an NFS mount with nolock), two processes write the same bytes to the same
places of a part, and the first to be done renames it: bandwidth is lost, never a file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from toka_engine.errors import StorageError
from toka_engine.hub.cache import ModelCache, Snapshot
from toka_engine.hub.failures import TransientError, client_error, is_offline
from toka_engine.hub.progress import spell_bytes

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

_MAX_CONNECTIONS = 8
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of one commit. `blob_name` is its hash: SHA-256 of a large file, else git's own of a blob."""

    name: str
    num_bytes: int
    blob_name: str


def list_files(wanted: Snapshot, *, may_be_cached: bool) -> tuple[str | None, list[HubFile]]:
    """Return the commit and the files that are wanted. None and nothing where the hub cannot be asked, if the cache may
    do; else the library's error."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils._paths import filter_repo_objects

    if is_offline():
        return None, []
    api = HfApi()
    try:
        commit = api.repo_info(wanted.name, revision=wanted.revision).sha or wanted.revision
        tree = [one for one in api.list_repo_tree(wanted.name, revision=commit) if isinstance(one, RepoFile)]
    except RevisionNotFoundError:
        raise
    except (HfHubHTTPError, client_error()):
        if not may_be_cached:
            raise
        return None, []
    by_name = {one.path: one for one in tree}
    names = filter_repo_objects(by_name, allow_patterns=list(wanted.patterns), ignore_patterns=list(wanted.NEVER))
    return commit, [_view(by_name[name]) for name in names]


def _view(entry: RepoFile) -> HubFile:
    if entry.lfs is not None:
        return HubFile(entry.path, entry.lfs.size, entry.lfs.sha256)
    return HubFile(entry.path, entry.size, entry.blob_id)


def check_space(num_bytes: int, cache: Path) -> None:
    """Raise StorageError if `num_bytes` more do not fit where `cache` is or will be."""
    folder = next((one for one in (cache, *cache.parents) if one.exists()), Path("/"))
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    if num_bytes > free:
        raise StorageError(f"{folder} has {spell_bytes(free)} free, the download takes {spell_bytes(num_bytes)}")


def fetch_files(cache: ModelCache, name: str, commit: str, files: Sequence[HubFile]) -> None:
    """Fetch every file that plain HTTP can have, several at a time."""
    from huggingface_hub import constants

    possible = [file for file in files if file.num_bytes <= constants.MAX_HTTP_DOWNLOAD_SIZE]
    if not possible:
        return
    with ThreadPoolExecutor(min(_MAX_CONNECTIONS, len(possible)), "download") as pool:
        for future in [pool.submit(_fetch_file, cache, name, commit, file) for file in possible]:
            future.result()


def _fetch_file(cache: ModelCache, name: str, commit: str, file: HubFile) -> None:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils._headers import build_hf_headers

    part = cache.part_path(file.blob_name)
    with part.open("r+b" if part.exists() else "wb") as stream:
        start = stream.seek(0, os.SEEK_END)
        if start > file.num_bytes:
            start = stream.seek(0)
            stream.truncate()
        http_get(
            hf_hub_url(name, file.name, revision=commit),
            stream,
            resume_size=start,
            headers=build_hf_headers(),
            expected_size=file.num_bytes,
        )
        stream.flush()
        if hash_file(part, file) != file.blob_name:
            part.unlink(missing_ok=True)
            raise TransientError(f"{file.name} has another hash than the hub says")
        os.fsync(stream.fileno())
    cache.accept_part(file.blob_name)


def hash_file(path: Path, file: HubFile) -> str:
    """Return the hash of a file of the kind that the hub gives for it."""
    is_large = len(file.blob_name) == hashlib.sha256().digest_size * 2
    digest = hashlib.sha256() if is_large else hashlib.sha1(f"blob {file.num_bytes}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
