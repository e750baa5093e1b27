"""The engine: an HTTP server, a CPU manager and model workers, each a process, under one supervisor.

In a script: `from toka_engine import LLM`, see `toka_engine.offline`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from toka_engine.version import __version__

if TYPE_CHECKING:
    from toka_engine.offline import LLM, AsyncLLM

__all__ = ["LLM", "AsyncLLM", "__version__"]


def __getattr__(name: str) -> Any:
    """Load the classes for scripts when they are asked for: the engine's processes need none of them."""
    if name in ("LLM", "AsyncLLM"):
        return getattr(import_module("toka_engine.offline"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
