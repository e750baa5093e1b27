"""Calls that only Linux or only glibc offers, each with what serves elsewhere: developers use macOS and musl too."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1

TRIM_INTERVAL_S = 60.0
COLLECT_INTERVAL_S = 1.0


def trim_heap() -> None:
    """Give memory that the allocator keeps back to the system, where the C library can."""
    if trim := _find("malloc_trim"):
        trim(0)


class HeapKeeper:
    """Gives back what the allocator keeps, once a minute: small blocks that come and go leave gaps that it fills too
    seldom, and a process that lives for weeks would grow by megabytes a day. Costs about a millisecond each time.
    """

    def __init__(self) -> None:
        self._next_s = 0.0
        self._next_collection_s = 0.0

    def give_back(self, now: float) -> None:
        """Give back what a large request has taken, which empties Python's lists of objects for the next use, too. A
        collection looks at every object (20 ms for half a million), so there is one a second at most.
        """
        if now >= self._next_collection_s:
            self._next_collection_s = now + COLLECT_INTERVAL_S
            gc.collect()
        trim_heap()

    def look(self, now: float) -> None:
        """Trim the heap if that is due; to be called often."""
        if now >= self._next_s:
            self._next_s = now + TRIM_INTERVAL_S
            trim_heap()


def end_with_parent() -> None:
    """Have the kernel end this process with its parent, where it can; elsewhere the end of the control link does it."""
    if prctl := _find("prctl"):
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def count_resident_bytes() -> int:
    """Return the bytes of memory that this process holds, or at its peak where the system does not tell."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def limit_memory_growth(num_bytes: int) -> None:
    """Let the address space grow by so much; where the system does not say how large it is, the limit is of its own."""
    size = 1 << 30
    with contextlib.suppress(OSError):
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = size + num_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def make_shared_memory(num_bytes: int) -> int:
    """Return the descriptor of zeroed memory that processes share by passing it on; nothing else can find it."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("toka")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, num_bytes)
    return fd


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal (SIGSTOP); False where the system does not tell."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def is_running(pid: int) -> bool:
    """Whether a thread of a process runs, waits for a CPU, or for a disk; False where the system does not tell."""
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # the thread has ended meanwhile
            if path.read_text().rpartition(")")[2].split()[0] in "RD":
                return True
    return False


def read_cpu_s(pid: int) -> float | None:
    """Return the CPU time of a process, of all its threads; None where the system does not tell, or it is gone."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return None


def open_pipe() -> tuple[int, int]:
    """Return a pipe whose ends do not block and are not inherited."""
    if hasattr(os, "pipe2"):
        return os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    read_end, write_end = os.pipe()  # not inherited either (PEP 446)
    for end in (read_end, write_end):
        os.set_blocking(end, False)
    return read_end, write_end


def _find(name: str) -> Any:
    """Return a function of the C library, or None."""
    return getattr(ctypes.CDLL(None), name, None)
