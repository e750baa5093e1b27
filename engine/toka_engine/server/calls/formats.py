"""The base of a tool call format, and what a reader has to know of a request's functions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from toka_engine.server.calls.source import Parts, Source, Steps


class CallReader(ABC):
    """Reads calls in one format, for the functions of one request; used by all choices of it, so it keeps no state."""

    marks: tuple[str, ...] = ()
    """Each begins a call wherever it stands in the answer."""
    is_at_beginning = False
    """Calls may also begin without a mark, where the answer's content does."""
    hidden: frozenset[str] = frozenset()
    """Marks that are special tokens: they are never shown, also where no call follows."""

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        """`parameters`: by function, the JSON Schema of its arguments."""
        self._parameters = parameters

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Return what it was made of."""
        return self._parameters

    @abstractmethod
    def read(self, source: Source, parts: Parts, mark: str) -> Steps[bool]:
        """Read the calls that follow `mark` ("": none stands before them). Return False where there is none, with
        nothing taken from `source`.
        """
