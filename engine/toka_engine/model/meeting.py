"""The file by which the ranks of a stage meet while they start, in the folder that the supervisor made for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed

from toka_engine.errors import StorageError

_distributed: Any = torch.distributed


def open_meeting(meeting: Path, rank: int, size: int) -> Any:
    """Return the store of the file `meeting`, which no earlier start has used, after a first write of `rank`.

    Raises StorageError where there is no folder or no room: torch's store would look for the folder for five minutes,
    and what is found out later looks like the loss of another rank.
    """
    try:
        meeting.touch(mode=0o600)
        store = _distributed.FileStore(str(meeting), size)
        store.set(f"{rank} has come", b"1")
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise StorageError(f"the ranks cannot meet in {meeting.parent}: {reason}") from error
    return store
