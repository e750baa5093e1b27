"""Tells how far a download is, by what lies on the disk, whichever process fetches it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

Report = Callable[[str], None]
"""Takes one line of progress."""

REPORT_INTERVAL_S = 2.0


@dataclass(frozen=True, slots=True)
class Transfer:
    """The state of a download."""

    num_bytes: int
    total_bytes: int
    bytes_per_s: float

    def __str__(self) -> str:
        return f"{spell_bytes(self.num_bytes)} of {spell_bytes(self.total_bytes)}, {self.bytes_per_s / 1e6:.1f} MB/s"


TakeTransfer = Callable[[Transfer], None]
"""Takes the state of a download, every few seconds."""


class Sized(Protocol):
    """A file of the hub."""

    @property
    def blob_name(self) -> str: ...

    @property
    def num_bytes(self) -> int: ...


class Measured(Protocol):
    """A cache of files of the hub."""

    def count_bytes(self, blob_name: str) -> int: ...


@contextmanager
def reporting(
    cache: Measured, files: Sequence[Sized], *, is_needed: bool, report: Report, on_transfer: TakeTransfer
) -> Iterator[None]:
    """Report bytes and rate of `files` every few seconds while the body runs, unless nothing is needed."""
    if not is_needed:
        yield
        return
    total = sum(file.num_bytes for file in files)
    before, started_at, is_done = _count(cache, files), time.monotonic(), threading.Event()

    def tell() -> None:
        now, seconds = _count(cache, files), max(1e-3, time.monotonic() - started_at)
        transfer = Transfer(now, total, max(0, now - before) / seconds)
        on_transfer(transfer)
        report(str(transfer))

    def watch() -> None:
        while not is_done.wait(REPORT_INTERVAL_S):
            tell()

    on_transfer(Transfer(before, total, 0.0))
    report(f"{spell_bytes(before) if before else '0'} of {spell_bytes(total)}")
    watcher = threading.Thread(target=watch, name="progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_done.set()
        watcher.join()
    tell()


def _count(cache: Measured, files: Sequence[Sized]) -> int:
    return sum(min(file.num_bytes, cache.count_bytes(file.blob_name)) for file in files)


def spell_bytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"
