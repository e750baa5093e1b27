"""The making of a checked request of a body, wherever that is done: on the event loop, or by another process.

Owns: what an endpoint has at hand for it. Nothing here answers, or has any other effect.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from toka_engine.server.decoding import BodyDecoder
from toka_engine.server.engine import Engine
from toka_engine.server.limits import GenerationOptions
from toka_engine.server.prompts import PromptEncoder
from toka_engine.server.reading import Asker

R = TypeVar("R")


class Preparation:
    """The making of one request."""

    def __init__(self, engine: Engine, asker: Asker, *, reports_unknown: bool) -> None:
        self.engine = engine
        self.asker = asker
        self.reports_unknown = reports_unknown
        self.ignored: list[str] = []
        """The fields without effect that have been found."""

    def decode(self, decoder: BodyDecoder[R], body: bytes | bytearray) -> R:
        """Return the request in `body`. Raises a 400 that names the field."""
        request, ignored = decoder.decode(body, reports_unknown=self.reports_unknown)
        self.ignored += ignored
        return request

    def note(self, names: Iterable[str]) -> None:
        """Note fields that have no effect."""
        self.ignored += names

    def make_encoder(self, options: GenerationOptions) -> PromptEncoder:
        """Return what encodes the prompts of this request."""
        return self.engine.make_encoder(options, self.asker)
