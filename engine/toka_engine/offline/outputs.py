"""The types that `LLM` takes and returns, and their form in requests and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict

Prompt: TypeAlias = str | Sequence[int]
"""A text, or token ids."""
Messages: TypeAlias = Sequence[Mapping[str, Any]]
"""A conversation: `{"role": ..., "content": ...}` each."""


class SamplingOptions(TypedDict, total=False):
    """The options of sampling. Each means what it does in the API (docs/api.md), limits and defaults included."""

    n: int
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    stop: str | Sequence[str]
    ignore_eos: bool
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[str, float]
    """By token id, as text."""
    allowed_token_ids: Sequence[int]
    bad_words: Sequence[str]
    min_tokens: int
    stop_token_ids: Sequence[int]
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    best_of: int
    response_format: Mapping[str, Any]
    """`{"type": "json_object"}`, or a JSON schema (docs/structured-output.md)."""
    structured_outputs: Mapping[str, Any]
    """One of json, regex, choice, grammar and json_object."""
    logprobs: int
    """The number of likeliest tokens to name at each position; 0: the sampled ones alone."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The tokens of a choice or piece. All lists have one entry a token."""

    token_ids: list[int]
    logprobs: list[float | None]
    """None where the API states none."""
    tops: list[dict[int, float]]
    """The likeliest tokens, and the sampled one, with their logprobs; empty with `logprobs=0`."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One sample of a prompt."""

    index: int
    text: str
    finish_reason: str
    """"stop" or "length"."""
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """The tokens sampled for one prompt, choice by choice."""

    prompt: Prompt | Messages
    choices: list[Choice]

    @property
    def texts(self) -> list[str]:
        return [choice.text for choice in self.choices]


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of choice `index`; the last piece of each choice has a finish reason."""

    index: int
    text: str
    finish_reason: str | None = None
    logprobs: TokenLogprobs | None = None


def completion_body(options: SamplingOptions) -> dict[str, Any]:
    """Return the fields of a completions request."""
    body: dict[str, Any] = dict(options)
    return body | {"return_tokens_as_token_ids": True} if body.get("logprobs") is not None else body


def chat_body(options: SamplingOptions) -> dict[str, Any]:
    """Return the fields of a chat request, whose logprobs are asked for in another way."""
    body: dict[str, Any] = dict(options)
    count = body.pop("logprobs", None)
    if count is not None:
        body |= {"logprobs": True, "top_logprobs": count, "return_tokens_as_token_ids": True}
    return body


def read_completion_logprobs(found: Mapping[str, Any] | None) -> TokenLogprobs | None:
    """Return the logprobs of a completion's choice."""
    if found is None:
        return None
    ids = [_token_id(name) for name in found["tokens"]]
    tops = found["top_logprobs"] or [{} for _ in ids]
    return TokenLogprobs(
        ids, found["token_logprobs"], [{_token_id(name): value for name, value in top.items()} for top in tops]
    )


def read_chat_logprobs(found: Mapping[str, Any] | None) -> TokenLogprobs | None:
    """Return the logprobs of a chat choice, in the form of completions."""
    if found is None:
        return None
    entries = found["content"]
    tops = [
        {_token_id(top["token"]): top["logprob"] for top in entry["top_logprobs"]}
        | ({_token_id(entry["token"]): entry["logprob"]} if entry["top_logprobs"] else {})
        for entry in entries
    ]
    return TokenLogprobs(
        [_token_id(entry["token"]) for entry in entries], [entry["logprob"] for entry in entries], tops
    )


def _token_id(name: str) -> int:
    return int(name.removeprefix("token_id:"))
