"""The parts of a request's and an answer's body that the generating endpoints share, as typed structs.

A field that is typed `Any`, here or in an endpoint's struct, is known to OpenAI's API and not supported: the checks
refuse it unless its value asks for nothing. Ranges and defaults are decided in `limits`.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

_STOP: dict[str, Any] = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]
}


def _null() -> msgspec.Raw:
    return msgspec.Raw(b"null")


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationRequest(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The fields that both generating endpoints share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    stop: Annotated[msgspec.Raw, Meta(description="a text or up to 16", extra_json_schema=_STOP)] = msgspec.field(
        default_factory=_null
    )
    """Decoded in `limits`, unless it is too large."""
    ignore_eos: bool | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    user: str | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    return_tokens_as_token_ids: bool | None = None
    logit_bias: msgspec.Raw = msgspec.field(default_factory=_null)
    """Not decoded: it may be large, and it is refused unless it is empty."""


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
