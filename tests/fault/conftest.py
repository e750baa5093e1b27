"""Tiny models, as the model tier makes them."""

from __future__ import annotations

from tests.model.conftest import make_tiny

__all__ = ["make_tiny"]
