"""Checks a request against the engine's limits. Nothing is ignored: what is wrong is refused.

Owns: ranges and defaults of the fields that the endpoints share. Each refusal is a 400 that names the field. Pure: no
I/O, no state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from toka_engine.config import EngineConfig
from toka_engine.messages import EngineInfo, Int32s
from toka_engine.server.decoding import decode_part
from toka_engine.server.errors import ApiError, invalid, no_model
from toka_engine.server.generation_defaults import (
    MAX_REPETITION_PENALTY,
    MAX_TEMPERATURE,
    MIN_REPETITION_PENALTY,
    SamplingDefaults,
)
from toka_engine.server.request import GenerationRequest
from toka_engine.server.stops import StopStrings
from toka_engine.server.streams import GenerationSpec
from toka_engine.slot_parameters import Sampling

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_PENALTY = 2.0
"""The largest presence and frequency penalty, of either sign."""
MAX_REQUEST_OUTPUT_TOKENS = 16 * 1024 * 1024
"""The most output tokens of one request, over all its choices."""
MAX_REQUEST_LOGPROBS = 1024 * 1024
"""The most logprobs in one answer: each is about a hundred bytes of JSON."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {"logit_bias": ({},)}
"""Fields that every generating endpoint knows and none supports, with the values (beside null) that ask for nothing."""

_MAX_NEUTRAL_BYTES = 256
_MAX_STOP_BYTES = 64 * 1024
"""The most bytes of JSON; allowed stop strings fit even if every character is written as two escapes."""
_decode_stop = msgspec.json.Decoder(str | list[str] | None).decode


class GenerationOptions(msgspec.Struct, frozen=True):
    """The checked fields of a request beyond its prompt; `max_tokens` None: as many as fit."""

    num_choices: int
    max_tokens: int | None
    max_tokens_field: str
    sampling: Sampling
    stops: StopStrings | None
    ignores_eos: bool
    is_streamed: bool
    includes_usage: bool
    names_token_ids: bool
    """Whether logprobs name tokens by their ids."""


class Limits:
    """The limits of this engine, as `EngineInfo` and the settings state them."""

    def __init__(
        self,
        config: EngineConfig,
        info: EngineInfo,
        names: Sequence[str],
        end_ids: tuple[int, ...],
        defaults: SamplingDefaults,
    ) -> None:
        self._config = config
        self._info = info
        self._names = names
        self._end_ids = end_ids
        self.defaults = defaults.complete(info.vocab_size)
        """The sampling parameters of requests that leave a field out."""
        self.max_request_tokens = min(info.max_request_tokens, info.num_kv_tokens)

    # ------------------------------------------------------------ fields

    def check_shared(
        self,
        request: GenerationRequest,
        *,
        max_tokens: int | None,
        max_tokens_field: str,
        num_logprobs: int,
        unsupported: dict[str, tuple[Any, ...]],
    ) -> GenerationOptions:
        """Check what the endpoints share: everything but the prompt. `unsupported`: as in `refuse_unsupported`."""
        self._check_model(request.model)
        refuse_unsupported(request, unsupported)
        stream_options = request.stream_options
        if stream_options is not None and not request.stream:
            raise invalid("stream_options", "'stream_options' needs 'stream' to be true.")
        if stream_options is not None and stream_options.include_obfuscation:
            raise _unsupported("stream_options.include_obfuscation", (False,))
        if request.return_tokens_as_token_ids and num_logprobs < 0:
            raise invalid("return_tokens_as_token_ids", "'return_tokens_as_token_ids' needs 'logprobs'.")
        return GenerationOptions(
            num_choices=int_in(request.n, "n", 1, self._config.max_choices_per_request, 1),
            max_tokens=None
            if max_tokens is None
            else int_in(max_tokens, max_tokens_field, 1, self.max_request_tokens, 1),
            max_tokens_field=max_tokens_field,
            sampling=self._check_sampling(request, num_logprobs),
            stops=_check_stops(request.stop),
            ignores_eos=bool(request.ignore_eos),
            is_streamed=bool(request.stream),
            includes_usage=bool(stream_options and stream_options.include_usage),
            names_token_ids=bool(request.return_tokens_as_token_ids),
        )

    def _check_model(self, name: str) -> None:
        if name not in self._names:
            raise no_model(name, self._names)

    def _check_sampling(self, request: GenerationRequest, num_logprobs: int) -> Sampling:
        defaults = self.defaults
        temperature = float_in(request.temperature, "temperature", 0.0, MAX_TEMPERATURE, defaults.temperature)
        top_p = float_in(request.top_p, "top_p", 0.0, 1.0, defaults.top_p)
        if top_p == 0.0:  # the smallest nucleus is the most likely token
            top_p, temperature = 1.0, 0.0
        seed = int_in(request.seed, "seed", -(2**63), 2**63 - 1, -1)
        return Sampling(
            temperature=temperature,
            top_p=top_p,
            top_k=max(0, int_in(request.top_k, "top_k", -1, self._info.vocab_size, defaults.top_k)),
            min_p=float_in(request.min_p, "min_p", 0.0, 1.0, defaults.min_p),
            seed=-1 if request.seed is None else seed & (2**63 - 1),
            num_logprobs=num_logprobs,
            presence_penalty=float_in(request.presence_penalty, "presence_penalty", -MAX_PENALTY, MAX_PENALTY, 0.0),
            frequency_penalty=float_in(request.frequency_penalty, "frequency_penalty", -MAX_PENALTY, MAX_PENALTY, 0.0),
            repetition_penalty=float_in(
                request.repetition_penalty,
                "repetition_penalty",
                MIN_REPETITION_PENALTY,
                MAX_REPETITION_PENALTY,
                defaults.repetition_penalty,
            ),
        )

    def max_top_logprobs(self) -> int:
        """Return the most top logprobs per token that a request may ask for."""
        return min(self._config.max_topk_logprobs, self._info.vocab_size)

    # ------------------------------------------------------------ prompts

    def check_num_prompts(self, num_prompts: int) -> None:
        if num_prompts > self._config.max_choices_per_request:
            raise invalid("prompt", f"'prompt' has more than {self._config.max_choices_per_request} prompts.")

    def check_texts(self, texts: list[str]) -> list[str]:
        self.check_num_prompts(len(texts))
        for index, text in enumerate(texts):
            if not text:
                raise invalid("prompt", "'prompt' is empty." if len(texts) == 1 else f"'prompt[{index}]' is empty.")
        return texts

    def check_num_ids(self, num_ids: int) -> None:
        if num_ids >= self.max_request_tokens:
            raise self.too_long("prompt", num_ids)

    def check_ids(self, ids: list[int], name: str) -> Int32s:
        """Return one prompt's ids as an array."""
        if not ids:
            raise invalid("prompt", f"'{name}' is empty.")
        self.check_num_ids(len(ids))
        lowest, highest = min(ids), max(ids)
        if lowest < 0 or highest >= self._info.vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise invalid("prompt", f"'{name}' has token id {wrong}; valid are 0 to {self._info.vocab_size - 1}.")
        return np.array(ids, np.int32)

    def check_text_size(self, param: str, num_bytes: int, max_bytes: int) -> None:
        """Refuse a text that cannot fit before it is encoded."""
        if num_bytes > max_bytes:
            raise invalid(
                param,
                f"'{param}' has {num_bytes} bytes; at most {self.max_request_tokens - 1} tokens fit.",
                "context_length_exceeded",
            )

    def too_long(self, param: str, num_tokens: int) -> ApiError:
        most = self.max_request_tokens - 1
        message = f"'{param}' has {num_tokens} tokens; at most {most} fit, with room for one more."
        return invalid(param, message, "context_length_exceeded")

    # ------------------------------------------------------------ the whole

    def plan(
        self, options: GenerationOptions, prompts: Sequence[Int32s], param: str, default_tokens: int | None = None
    ) -> GenerationSpec:
        """Check the request as a whole. `param`: the field of the prompt; `default_tokens` None: as many as
        fit.
        """
        longest = max(map(len, prompts))
        room = self.max_request_tokens - longest
        if any(not len(ids) for ids in prompts):
            raise invalid(param, f"'{param}' has no tokens.")
        if room < 1:
            raise self.too_long(param, longest)
        max_tokens = options.max_tokens or min(room, default_tokens or room)
        if max_tokens > room:
            raise invalid(
                options.max_tokens_field,
                f"'{options.max_tokens_field}' is {max_tokens}, but {longest} tokens of prompt leave {room} of "
                f"{self.max_request_tokens}.",
                "context_length_exceeded",
            )
        self._check_size(options, len(prompts), max_tokens, param)
        return GenerationSpec(
            num_choices=options.num_choices,
            max_tokens=max_tokens,
            sampling=options.sampling,
            stop_ids=() if options.ignores_eos else self._end_ids,
            deliver_each=options.is_streamed or options.stops is not None,
        )

    def _check_size(self, options: GenerationOptions, num_prompts: int, max_tokens: int, param: str) -> None:
        num_choices = num_prompts * options.num_choices
        if num_choices > self._config.max_choices_per_request:
            raise invalid(
                "n" if options.num_choices > 1 else param,
                f"{num_prompts} prompts times n={options.num_choices} are more than "
                f"{self._config.max_choices_per_request} choices.",
            )
        if num_choices * max_tokens > MAX_REQUEST_OUTPUT_TOKENS:
            raise invalid(
                options.max_tokens_field,
                f"{num_choices} choices of {max_tokens} tokens are more than one answer may hold.",
            )
        num_logprobs = 1 + options.sampling.num_logprobs
        if num_choices * max_tokens * num_logprobs > MAX_REQUEST_LOGPROBS:
            raise invalid("logprobs", f"The answer could hold more than {MAX_REQUEST_LOGPROBS} logprobs.")


def refuse_unsupported(request: msgspec.Struct, unsupported: dict[str, tuple[Any, ...]], prefix: str = "") -> None:
    """Refuse each field of `unsupported`, unless its value is null or one of those that ask for nothing."""
    for name in request.__struct_fields__:
        if name in unsupported:
            value = _small(getattr(request, name))
            # 0 and False are equal in Python and are not in JSON.
            if value is not None and not any(
                value == plain and isinstance(value, bool) == isinstance(plain, bool) for plain in unsupported[name]
            ):
                raise _unsupported(prefix + name, unsupported[name])


def _small(value: Any) -> Any:
    """A raw value decoded, unless it is too large to be neutral."""
    if isinstance(value, msgspec.Raw) and memoryview(value).nbytes <= _MAX_NEUTRAL_BYTES:
        return decode_part(msgspec.json.decode, value, "logit_bias")
    return value


def _unsupported(name: str, neutral: tuple[Any, ...]) -> ApiError:
    """The 400 of a field that this server does not support; `neutral`: its values that ask for nothing."""
    values = " or ".join(msgspec.json.encode(value).decode() for value in neutral)
    advice = f"it may only be {values}, or left out" if neutral else "no value of it is; leave it out"
    return invalid(name, f"'{name}' is not supported: {advice}.", "unsupported_parameter")


def _check_stops(raw: msgspec.Raw) -> StopStrings | None:
    if memoryview(raw).nbytes > _MAX_STOP_BYTES:
        raise invalid("stop", f"'stop' has more than {_MAX_STOP_BYTES} bytes.")
    stop = decode_part(_decode_stop, raw, "stop")
    if stop is None or stop == []:
        return None
    patterns = [stop] if isinstance(stop, str) else stop
    if len(patterns) > MAX_STOP_STRINGS:
        raise invalid("stop", f"'stop' has {len(patterns)} strings; at most {MAX_STOP_STRINGS} are allowed.")
    for pattern in patterns:
        if not 1 <= len(pattern) <= MAX_STOP_CHARACTERS:
            raise invalid("stop", f"A stop string must have 1 to {MAX_STOP_CHARACTERS} characters.")
    return StopStrings(tuple(patterns))


def int_in(value: int | None, name: str, lowest: int, highest: int, default: int) -> int:
    """Return `value`, or `default` for null. Raises a 400 that names the field and its range."""
    if value is None:
        return default
    if not lowest <= value <= highest:
        raise invalid(name, f"'{name}' must be from {lowest} to {highest}.", "invalid_value")
    return value


def float_in(value: float | None, name: str, lowest: float, highest: float, default: float) -> float:
    if value is None:
        return default
    if not (math.isfinite(value) and lowest <= value <= highest):
        raise invalid(name, f"'{name}' must be from {lowest:g} to {highest:g}.", "invalid_value")
    return value
