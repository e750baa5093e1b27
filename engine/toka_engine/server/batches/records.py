"""Files and batches as the API shows them, and their ids.

The shapes are those of OpenAI's API (the `FileObject` and `Batch` of its clients). Times are Unix seconds.
"""

from __future__ import annotations

import re
import secrets
import time
from typing import Literal

import msgspec

BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
_OWNED_ID = re.compile(r"(?:file-|batch_)(0|[1-9][0-9]{0,3})-[0-9a-f]{24}")
OVER: frozenset[str] = frozenset(("failed", "completed", "expired", "cancelled"))
"""The states that a batch does not leave."""


def now() -> int:
    return int(time.time())


def new_file_id(ordinal: int | None = None) -> str:
    """Return a new id, which tells the replica that has the file where there are several."""
    return f"file-{_owner_mark(ordinal)}{secrets.token_hex(12)}"


def new_batch_id(ordinal: int | None = None) -> str:
    return f"batch_{_owner_mark(ordinal)}{secrets.token_hex(12)}"


def _owner_mark(ordinal: int | None) -> str:
    return "" if ordinal is None else f"{ordinal}-"


def ordinal_of(stored_id: str) -> int | None:
    """Return the ordinal in an id of ours; None for one without, and for whatever is no such id."""
    found = _OWNED_ID.fullmatch(stored_id)
    return int(found[1]) if found else None


class FileObject(msgspec.Struct, frozen=True, kw_only=True):
    """A stored file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    expires_at: int | None = None


class FileList(msgspec.Struct, frozen=True, kw_only=True):
    """One page of the stored files."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to the deletion of a file."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class RequestCounts(msgspec.Struct, frozen=True):
    """The numbers of a batch's lines: `completed` are answered with 200, `failed` otherwise."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchError(msgspec.Struct, frozen=True, kw_only=True):
    """A fault of a batch; `line` counts from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(msgspec.Struct, frozen=True):
    """The faults for which a batch failed, or waits."""

    data: list[BatchError]
    object: Literal["list"] = "list"


class CachedTokens(msgspec.Struct, frozen=True):
    cached_tokens: int = 0


class ReasoningTokens(msgspec.Struct, frozen=True):
    reasoning_tokens: int = 0


class BatchUsage(msgspec.Struct, frozen=True):
    """Tokens of a batch's answered lines."""

    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    input_tokens_details: CachedTokens = CachedTokens()
    output_tokens_details: ReasoningTokens = ReasoningTokens()


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch and how far it is."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None = None
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = RequestCounts()
    usage: BatchUsage = BatchUsage()
    metadata: dict[str, str] | None = None


class BatchList(msgspec.Struct, frozen=True, kw_only=True):
    """One page of the batches."""

    object: Literal["list"] = "list"
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool


class StoredBatch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch with what only the server knows of it: which bytes of its result files count, which lines are done."""

    owner: str
    batch: Batch
    output_id: str
    error_id: str
    output_bytes: int = 0
    error_bytes: int = 0
    done: bytes = b""
    """One bit for each line of the input, the first line's lowest."""
    results_expire_s: int | None = None
    """Seconds after the end for which the result files are kept."""

    @property
    def is_over(self) -> bool:
        return self.batch.status in OVER
