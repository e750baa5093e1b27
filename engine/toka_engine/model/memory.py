"""Finds how much memory this process may use, and the KV cache's share of it.

Reads cgroup v2, v1, else /proc/meminfo, else the machine's size.
"""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60
_RESERVE_BYTES = 1 << 30
"""Bytes left to the other processes and to this one's activations."""
_SHARE = 0.6
"""The KV cache's share of the memory above the reserve."""
_MAX_CACHE_BYTES = 768 << 20
"""Largest KV cache on a CPU, which decodes too slowly to fill more; with a small model the engine stays below 2 GB."""


def read_limit_bytes(cgroup: Path = _CGROUP, meminfo: Path = Path("/proc/meminfo")) -> int:
    """Return the bytes still usable: the tightest cgroup's limit less its use, or the machine's available memory."""
    pairs = (
        (cgroup / "memory.max", cgroup / "memory.current", cgroup / "memory.stat"),
        (
            cgroup / "memory/memory.limit_in_bytes",
            cgroup / "memory/memory.usage_in_bytes",
            cgroup / "memory/memory.stat",
        ),
    )
    available = _read_available(meminfo)
    for limit_file, usage_file, stat_file in pairs:
        limit, usage = _read_number(limit_file), _read_number(usage_file)
        if limit is not None and usage is not None and limit < _UNLIMITED:
            # Page cache counts as use but gives way.
            available = min(available, max(0, limit - usage + _read_stat(stat_file, "inactive_file")))
    return available


def choose_num_pages(
    available_bytes: int, bytes_per_page: int, min_pages: int, configured_tokens: int | None, page_size: int
) -> int:
    """Pages of the KV cache: what the user set, else a share of what is left, at least `min_pages`."""
    if configured_tokens is not None:
        return max(1, -(-configured_tokens // page_size))
    share = int((available_bytes - _RESERVE_BYTES) * _SHARE)
    return max(min_pages, min(share, _MAX_CACHE_BYTES) // bytes_per_page)


def count_threads(cgroup: Path = _CGROUP) -> int:
    """CPUs that this process may use: its affinity, cut to the cgroup's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read_words(cgroup / "cpu.max") or [
        *_read_words(cgroup / "cpu/cpu.cfs_quota_us"),
        *_read_words(cgroup / "cpu/cpu.cfs_period_us"),
    ]
    if len(quota) == 2 and quota[0].isdecimal() and quota[1].isdecimal():
        allowed = min(allowed, max(1, round(int(quota[0]) / int(quota[1]))))
    return allowed


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except OSError:
        return []


def _read_number(path: Path) -> int | None:
    words = _read_words(path)
    return int(words[0]) if words and words[0].isdecimal() else None


def _read_stat(path: Path, name: str) -> int:
    words = _read_words(path)
    return int(words[words.index(name) + 1]) if name in words else 0


def _read_available(meminfo: Path) -> int:
    words = _read_words(meminfo)
    if "MemAvailable:" in words:
        return int(words[words.index("MemAvailable:") + 1]) * 1024
    # Not Linux: of the machine's memory, a half may be taken to be free.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
