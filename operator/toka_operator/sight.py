"""Says whether the operator sees a kind that a cluster need not have, and so may make objects of it. Pure."""

from __future__ import annotations

KNOWN, UNKNOWN, NOT_ALLOWED = "Known", "Unknown", "NotAllowed"
"""The operator sees it, the API server has no such kind, or the chart does not let the operator."""
