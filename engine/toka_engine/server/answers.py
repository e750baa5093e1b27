"""The base of an endpoint's answer format: a whole body, or server-sent events."""

from __future__ import annotations

import math
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeAlias

import msgspec
from msgspec import UNSET, UnsetType

from toka_engine.messages import Int32s
from toka_engine.server.errors import ApiError
from toka_engine.server.render import ShownToken
from toka_engine.server.request import Usage

_NO_LOGPROB = -9999.0
"""The number that OpenAI's API writes for a logprob that is too low to state."""
_NO_USAGE = b'],"usage":null}\n\n'
"""The end of an event; no text can have it, for there a quote stands behind a backslash."""
encode = msgspec.json.encode
_random_bits = random.Random().getrandbits
"""Makes ids, which must differ and open no door: seeded by the system once, so that none costs a call to it."""


class PromptTokenLogprob(msgspec.Struct, frozen=True):
    """One of a prompt's tokens, or of those that are likeliest in its place."""

    logprob: float
    rank: int
    decoded_token: str


PromptByToken: TypeAlias = list[dict[str, PromptTokenLogprob] | None]
"""At each position of a prompt its token and the likeliest ones, by id; null at the first."""


class FinishedChoice(msgspec.Struct):
    """One choice of a whole answer."""

    text: str
    finish_reason: str | None
    shown: list[ShownToken]
    source: int = 0
    """Its index among the choices that were sampled."""
    prompt_logprobs: PromptByToken | UnsetType = UNSET


class AnswerFormat(ABC):
    """Writes one request's answer in the shape of its endpoint. Events come complete, with `data: ` and the empty line;
    their constant parts are encoded once per request. It holds no state of the generation.
    """

    id_prefix: str
    chunk_object: str
    done = b"data: [DONE]\n\n"
    """The end of a stream that has succeeded."""

    def __init__(
        self,
        model: str,
        label_of: Callable[[int], bytes],
        *,
        has_logprobs: bool,
        num_top: int,
        includes_usage: bool,
        names_token_ids: bool,
        fingerprint: str = "",
        prompts: Sequence[Int32s] | None = None,
        num_choices: int = 1,
        is_streamed: bool = True,
    ) -> None:
        """`fingerprint`: of the engine's configuration; `prompts`: where the answer has the token ids of prompts and
        choices; `num_choices`: choices of each prompt.
        """
        self.id = f"{self.id_prefix}-{_random_bits(96):024x}"
        self.created = int(time.time())
        self.model = model
        self.fingerprint = fingerprint
        self.returns_ids = prompts is not None
        self._prompts = prompts or ()
        self._num_choices = num_choices
        self._label_of = label_of
        self._has_logprobs = has_logprobs
        self._num_top = num_top
        self._names_token_ids = names_token_ids
        self._head = self._encode_head() if is_streamed else b""
        self._tail = _NO_USAGE if includes_usage else b"]}\n\n"

    def _encode_head(self) -> bytes:
        """Return the begin of every event, up to its choices."""
        head = encode(
            {
                "id": self.id,
                "object": self.chunk_object,
                "created": self.created,
                "model": self.model,
                "system_fingerprint": self.fingerprint,
                "choices": [],
            }
        )
        return b"data: " + head[: -len(b"]}")]

    @abstractmethod
    def whole(self, choices: Sequence[FinishedChoice], usage: Usage) -> bytes:
        """Return the body of an answer that is not streamed."""

    @abstractmethod
    def opening(self, index: int) -> bytes:
        """Return the event before the first text of a choice; may be empty."""

    @abstractmethod
    def piece(self, index: int, text: str, shown: list[ShownToken], finish_reason: str | None) -> bytes:
        """Return the events for new text of a choice, and for its end if it has one."""

    def usage(self, usage: Usage) -> bytes:
        """Return the last event of a stream that asks for usage."""
        return self._head + b'],"usage":' + encode(usage) + b"}\n\n"

    def error_event(self, error: ApiError) -> bytes:
        """Return the last event of a stream that fails."""
        return b"data: " + error.body() + b"\n\n"

    def with_usage(self, events: bytes, usage: Usage) -> bytes:
        """Return events in which `usage` stands in the place of null."""
        return events.replace(_NO_USAGE, b'],"usage":%s}\n\n' % encode(usage))

    def prompt_ids(self, index: int) -> list[int] | UnsetType:
        """Return the ids of the prompt of choice `index`, where the answer has them."""
        return self._prompts[index // self._num_choices].tolist() if self.returns_ids else UNSET

    def _ids(self, shown: Sequence[ShownToken]) -> list[int] | UnsetType:
        return [each.token for each in shown if not each.is_prompt] if self.returns_ids else UNSET

    def _name(self, token: int) -> str:
        if self._names_token_ids:
            return f"token_id:{token}"
        return self._label_of(token).decode("utf-8", "replace")


def plain_logprob(logprob: float) -> float:
    """Return a number that JSON can hold."""
    return logprob if math.isfinite(logprob) else _NO_LOGPROB
