"""The request and response bodies of the API, as typed structs, and the decoding of a raw body into them.

Owns: names and types of fields, and the naming of the field in which a body is wrong. Ranges and what is
supported are decided in `limits`. A field that is typed `Any` here is known to OpenAI's API and not
supported: `limits` refuses it unless its value is neutral.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

from toka_engine.server.errors import ApiError, invalid

R = TypeVar("R")
T = TypeVar("T")

# ---------------------------------------------------------------- requests


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationRequest(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What both endpoints share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    stop: msgspec.Raw = msgspec.Raw(b"null")
    """A text or a list of texts: decoded in `limits`, unless it is too large."""
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
    logit_bias: msgspec.Raw = msgspec.Raw(b"null")
    """Not decoded: it may be large, and it is refused unless it is empty."""


class CompletionRequest(GenerationRequest, forbid_unknown_fields=True, frozen=True, kw_only=True):
    prompt: msgspec.Raw
    """Text, ids, or a list of either: see `reading`."""
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: Any = None


class ContentPart(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    type: str
    text: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    refusal: Any = None


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    role: str
    content: str | list[ContentPart] | None = None
    name: Any = None
    tool_calls: Any = None
    tool_call_id: Any = None
    function_call: Any = None
    refusal: Any = None
    audio: Any = None
    annotations: Any = None


class ChatRequest(GenerationRequest, forbid_unknown_fields=True, frozen=True, kw_only=True):
    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: Any = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    service_tier: Any = None
    store: Any = None
    metadata: Any = None
    web_search_options: Any = None
    chat_template: Any = None


# ---------------------------------------------------------------- responses


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(msgspec.Struct, frozen=True):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[ChatTokenLogprob]
    refusal: None = None


class AnswerMessage(msgspec.Struct, frozen=True):
    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None


# ---------------------------------------------------------------- decoding

_PATH = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_NAMED = re.compile(r"(?P<kind>unknown|missing required) field `(?P<name>[^`]*)`")
_STARTS = (
    (b"\xef\xbb\xbf", "it begins with a byte order mark (BOM), which has to go"),
    (b"\xff\xfe", "it is UTF-16 or UTF-32"),
    (b"\xfe\xff", "it is UTF-16"),
    (b"\x00\x00\xfe\xff", "it is UTF-32"),
    (b"\x1f\x8b", "it is compressed (gzip)"),
    (b"\x78\x01", "it is compressed (deflate)"),
    (b"\x78\x9c", "it is compressed (deflate)"),
    (b"\x78\xda", "it is compressed (deflate)"),
    (b"\x28\xb5\x2f\xfd", "it is compressed (zstd)"),
)
"""First bytes of what is often sent as JSON, and is none."""
_EXPLAINED_BODY_BYTES = 64 * 1024
"""Larger bodies that are not JSON get no second look for the field's name."""


class BodyDecoder(Generic[R]):
    """Decodes the raw body of one endpoint."""

    def __init__(self, request_type: type[R]) -> None:
        self._decoder = msgspec.json.Decoder(request_type)

    def decode(self, body: bytes) -> R:
        """Return the request. Raises a 400 that names the field, or says why the body is not JSON."""
        try:
            return self._decoder.decode(body)
        except msgspec.ValidationError as error:
            raise _mistyped(str(error)) from error
        except RecursionError as error:
            raise invalid(None, "The body is nested too deeply.") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _not_json(body, str(error)) from error


def decode_part(decode: Callable[[msgspec.Raw], T], raw: msgspec.Raw, name: str) -> T:
    """Decode field `name`, which the body's decoder has skipped. Raises a 400 that names it."""
    try:
        return decode(raw)
    except msgspec.ValidationError as error:
        raise _mistyped(str(error), name) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(name, f"Invalid value for '{name}': {error}.", "invalid_json") from error


def _mistyped(message: str, prefix: str = "") -> ApiError:
    found = _PATH.search(message)
    path = prefix + (found["path"] if found else "")
    text = message[: found.start()] if found else message
    if named := _NAMED.search(message):
        path = f"{path}.{named['name']}" if path else named["name"]
        if named["kind"] == "unknown":
            return invalid(path, f"Unknown field: '{path}'.", "unknown_parameter")
        return invalid(path, f"Missing required field: '{path}'.", "missing_required_parameter")
    return invalid(path or None, f"Invalid value for '{path or 'body'}': {text}.", "invalid_type")


def _not_json(body: bytes, message: str) -> ApiError:
    """Say what the body is where that shows. Name the field where it is JSON but for a NaN, an infinity or half a
    surrogate pair.
    """
    for start, what in _STARTS:
        if body.startswith(start):
            return invalid(None, f"The body is no JSON in UTF-8: {what}.", "invalid_json")
    if b"\0" in body[:4]:
        return invalid(None, "The body is no JSON in UTF-8: it seems to be UTF-16 or UTF-32.", "invalid_json")
    if len(body) <= _EXPLAINED_BODY_BYTES:
        odd = object()
        try:
            value = json.loads(body, parse_constant=lambda _: odd)
        except (ValueError, RecursionError):
            value = None
        for name, part in value.items() if isinstance(value, dict) else ():
            if _contains(part, odd):
                return invalid(name, f"Invalid value for '{name}': NaN and infinity are not JSON.", "invalid_type")
            if not _is_text(part):
                return invalid(name, f"Invalid value for '{name}': half a surrogate pair.", "invalid_type")
    return invalid(None, f"The body is not valid JSON: {message}.", "invalid_json")


def _contains(value: Any, wanted: object) -> bool:
    if isinstance(value, (list, dict)):
        return any(_contains(item, wanted) for item in (value.values() if isinstance(value, dict) else value))
    return value is wanted


def _is_text(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True
