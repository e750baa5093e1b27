"""Times as Kubernetes writes them. Pure."""

from __future__ import annotations

from datetime import UTC, datetime


def parse_time(text: str | None) -> float:
    """Unix time of an RFC 3339 time; 0.0 for none, and for what Python takes for none (a leap second): a status may be
    edited by hand."""
    try:
        return datetime.fromisoformat(text.upper().replace("Z", "+00:00")).timestamp() if text else 0.0
    except (ValueError, OverflowError):
        return 0.0


def format_time(now: float) -> str:
    return datetime.fromtimestamp(now, tz=UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
