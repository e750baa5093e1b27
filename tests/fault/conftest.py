"""Models, as the model tier makes and finds them."""

from __future__ import annotations

from tests.model.conftest import make_tiny, smollm2

__all__ = ["make_tiny", "smollm2"]
