"""The parameters of a generation: what `limits` makes of a checked request, and `streams` submits."""

from __future__ import annotations

import msgspec

from toka_engine.grammar.source import GrammarSource
from toka_engine.messages import LogitEdits
from toka_engine.slot_parameters import Sampling


class GenerationSpec(msgspec.Struct, frozen=True):
    """The parameters of a generation, the same for every prompt of a request."""

    num_choices: int
    """The number of output sequences per prompt."""
    max_tokens: int
    sampling: Sampling
    stop_ids: tuple[int, ...]
    deliver_each: bool
    is_streamed: bool = False
    grammar: GrammarSource | None = None
    priority: int = 0
    timeout_s: float = 0.0
    """Seconds until it ends unfinished; 0: never."""
    edits: LogitEdits | None = None
    delivers_stop: bool = False
    prompt_logprobs: int = -1
