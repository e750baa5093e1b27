"""The parts of a request's and an answer's body that the generating endpoints share, as typed structs.

Owns: names, types and ranges of these fields, with the sentence that /openapi.json and docs/api.md print of each. A
field stands here only if it has an effect, or is a hint of `fields`. Null and absence are the same. Ranges that depend
on the engine are checked in `settings` and `limits`.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, TypeAlias

import msgspec
from msgspec import Meta

from toka_engine.server.generation_defaults import MAX_REPETITION_PENALTY, MAX_TEMPERATURE, MIN_REPETITION_PENALTY

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_PENALTY = 2.0
"""The largest presence and frequency penalty, of either sign."""
MAX_BIAS = 100.0
"""The largest bias of a logit, of either sign."""
MAX_EDITED_TOKENS = 1024
"""The most tokens that one field may bias, allow, bar or stop at."""
MAX_WORD_CHARACTERS = 16384
"""The most characters of all words together that one request may bar."""

_STOP: dict[str, Any] = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]
}
_SCHEMA: dict[str, Any] = {"anyOf": [{"type": "object"}, {"type": "string"}, {"type": "null"}]}
_NAMED_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 64},
        "description": {"type": ["string", "null"]},
        "schema": {"type": "object"},
        "strict": {"type": ["boolean", "null"]},
    },
    "required": ["name", "schema"],
    "additionalProperties": False,
}
_RESPONSE_FORMAT: dict[str, Any] = {
    "anyOf": [
        {
            "type": "object",
            "properties": {
                "type": {"enum": ["text", "json_object", "json_schema"]},
                "json_schema": {"anyOf": [_NAMED_SCHEMA, {"type": "null"}]},
            },
            "required": ["type"],
            "additionalProperties": False,
        },
        {"type": "null"},
    ]
}
_STRUCTURED_OUTPUTS: dict[str, Any] = {
    "anyOf": [
        {
            "type": "object",
            "properties": {
                "json": _SCHEMA,
                "regex": {"type": ["string", "null"]},
                "choice": {"type": ["array", "null"], "items": {"type": "string"}},
                "grammar": {"type": ["string", "null"], "description": "in llguidance's Lark"},
                "json_object": {"enum": [True, None]},
            },
            "additionalProperties": False,
        },
        {"type": "null"},
    ]
}


def doc(text: str) -> Meta:
    """The sentence on a field, for people."""
    return Meta(description=text)


Share = Annotated[float, Meta(ge=0, le=1)]
Temperature = Annotated[float, Meta(ge=0, le=MAX_TEMPERATURE)]
Penalty = Annotated[float, Meta(ge=-MAX_PENALTY, le=MAX_PENALTY)]
RepetitionPenalty = Annotated[float, Meta(ge=MIN_REPETITION_PENALTY, le=MAX_REPETITION_PENALTY)]
MinTokens = Annotated[int, Meta(ge=0)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
_HINT = doc("A hint without effect, named in `x-toka-ignored`.")


NULL: Final = msgspec.Raw(b"null")
"""The value of an undecoded field that a request leaves out: one object, so that absence is seen without a look."""


def _null() -> msgspec.Raw:
    return NULL


MAX_PRIORITY = 100
FLEX_PRIORITY = 10
"""The priority of `service_tier: flex`."""
ServiceTier: TypeAlias = Annotated[
    str | None, doc(f"`flex` is background work, as `priority` {FLEX_PRIORITY}; others are a hint without effect.")
]
MAX_TIMEOUT_S = 86400
Timeout: TypeAlias = Annotated[
    Annotated[float, Meta(gt=0, le=MAX_TIMEOUT_S)] | None,
    doc("Seconds for the whole answer; then 504, in a stream as its last event. 429 if it cannot start by then."),
]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Options of a streamed answer."""

    include_usage: Annotated[bool | None, doc("The last event before `[DONE]` has the usage.")] = None
    continuous_usage_stats: Annotated[bool | None, doc("Every event has the usage of its choice so far.")] = None
    include_obfuscation: Annotated[bool | None, doc("Only false: events are never padded.")] = None


class Hints(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The hints that every generating endpoint takes."""

    user: Annotated[str | None, _HINT] = None
    safety_identifier: Annotated[str | None, _HINT] = None
    prompt_cache_key: Annotated[str | None, _HINT] = None
    prompt_cache_retention: Annotated[str | None, _HINT] = None
    prompt_cache_options: Annotated[dict[str, Any] | None, _HINT] = None
    service_tier: ServiceTier = None
    metadata: Annotated[dict[str, Any] | None, _HINT] = None
    request_id: Annotated[str | None, _HINT] = None


class GenerationRequest(Hints, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The fields that both generating endpoints share."""

    model: Annotated[str, doc("The served name or an alias.")]
    priority: Annotated[
        Annotated[int, Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None,
        doc("Lower goes first; default 0. Above 0 is background work, which gives way to other requests."),
    ] = None
    timeout_s: Timeout = None
    stream: Annotated[bool | None, doc("Server-sent events, token by token.")] = None
    stream_options: Annotated[StreamOptions | None, doc("Only together with `stream`.")] = None
    n: Annotated[
        int | None,
        doc("Choices per prompt; times the number of prompts up to `max_choices_per_request` (1,024)."),
    ] = None
    max_tokens: Annotated[int | None, doc("From 1. Prompt and `max_tokens` together must fit.")] = None
    stop: Annotated[
        msgspec.Raw,
        Meta(
            description=f"A text or up to {MAX_STOP_STRINGS}, each of 1 to {MAX_STOP_CHARACTERS} characters.",
            extra_json_schema=_STOP,
        ),
    ] = msgspec.field(default_factory=_null)
    """Decoded in `settings`, unless it is too large."""
    ignore_eos: Annotated[bool | None, doc("Generate to `max_tokens`, whatever the model says.")] = None
    seed: Annotated[Seed | None, doc("Of a negative one the lower 63 bits count.")] = None
    temperature: Annotated[Temperature | None, doc("0 is greedy.")] = None
    top_p: Annotated[Share | None, doc("0 is greedy.")] = None
    top_k: Annotated[int | None, doc("-1 to the vocabulary's size; 0 and -1: all.")] = None
    min_p: Annotated[Share | None, doc("0: off.")] = None
    frequency_penalty: Annotated[Penalty | None, doc("0: off.")] = None
    presence_penalty: Annotated[Penalty | None, doc("0: off.")] = None
    repetition_penalty: Annotated[RepetitionPenalty | None, doc("1: off.")] = None
    response_format: Annotated[
        msgspec.Raw,
        Meta(description="The answer is a JSON object, or fits a schema.", extra_json_schema=_RESPONSE_FORMAT),
    ] = msgspec.field(default_factory=_null)
    """Decoded in `grammar_requests`, as are the fields below."""
    structured_outputs: Annotated[
        msgspec.Raw,
        Meta(description="The answer is a text of this grammar (vLLM's form).", extra_json_schema=_STRUCTURED_OUTPUTS),
    ] = msgspec.field(default_factory=_null)
    guided_json: Annotated[
        msgspec.Raw,
        Meta(description="The same as `structured_outputs.json`.", extra_json_schema=_SCHEMA),
    ] = msgspec.field(default_factory=_null)
    guided_regex: Annotated[str | None, doc("The same as `structured_outputs.regex`.")] = None
    guided_choice: Annotated[list[str] | None, doc("The same as `structured_outputs.choice`.")] = None
    guided_grammar: Annotated[str | None, doc("The same as `structured_outputs.grammar`.")] = None
    logit_bias: Annotated[
        dict[str, float] | None,
        doc(f"Added to the logits of up to {MAX_EDITED_TOKENS} token ids, -{MAX_BIAS:g} to {MAX_BIAS:g} each."),
    ] = None
    allowed_token_ids: Annotated[
        list[int] | None, doc(f"No other token is sampled; up to {MAX_EDITED_TOKENS} ids.")
    ] = None
    bad_words: Annotated[
        list[str] | None,
        doc(
            "Words never sampled, by themselves and with a space before: no token may end one that was sampled so far."
        ),
    ] = None
    min_tokens: Annotated[
        MinTokens | None, doc("No end, stop token or stop string before so many tokens; up to `max_tokens`.")
    ] = None
    stop_token_ids: Annotated[
        list[int] | None, doc(f"Tokens that end a choice, also with `ignore_eos`; up to {MAX_EDITED_TOKENS} ids.")
    ] = None
    include_stop_str_in_output: Annotated[
        bool | None, doc("The text keeps the stop string, or the stop token's text, that ended it.")
    ] = None
    skip_special_tokens: Annotated[bool | None, doc("False: the text shows special tokens by their names.")] = None
    best_of: Annotated[
        int | None,
        doc("Samples so many choices and returns the `n` of the highest mean logprob, best first; not streamed."),
    ] = None
    prompt_logprobs: Annotated[
        int | None,
        doc("Logprobs of the prompt's tokens, each with 0 to `max_topk_logprobs` likeliest ones; not streamed."),
    ] = None
    return_tokens_as_token_ids: Annotated[
        bool | None, doc("Logprobs name tokens `token_id:N`; only together with `logprobs`.")
    ] = None
    return_token_ids: Annotated[
        bool | None, doc("The answer has the token ids of the prompt and of each choice, in vLLM's fields.")
    ] = None
    add_special_tokens: Annotated[
        bool | None, doc("Add the tokenizer's own (BOS) to a text. True by default in completions, false in chat.")
    ] = None
    truncate_prompt_tokens: Annotated[
        Annotated[int, Meta(ge=-1)] | None,
        doc("Keep the last so many tokens of each prompt; -1: as many as fit with `max_tokens`, or with one more."),
    ] = None


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """The prompt tokens, by kind."""

    cached_tokens: int
    """Those whose keys and values were in the prefix cache already."""


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """The tokens that a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | msgspec.UnsetType = msgspec.UNSET
    """Only of models that reason."""
