"""Makes the settings of a generation from a request's fields: the one place where a checked request becomes settings.

Owns: what the fields that the endpoints share mean, their defaults, and the ranges that depend on the engine. Prompts
and sizes belong to `limits`. Each refusal is a 400 that names the field. Pure: no I/O, no state.
"""

from __future__ import annotations

import msgspec

from toka_engine.server.decoding import decode_part
from toka_engine.server.edit_requests import check_token_rules
from toka_engine.server.errors import invalid
from toka_engine.server.fields import Lacking, lacks
from toka_engine.server.grammar_requests import read_grammar
from toka_engine.server.limits import GenerationOptions, Limits, int_in
from toka_engine.server.request import FLEX_PRIORITY, MAX_STOP_CHARACTERS, MAX_STOP_STRINGS, NULL, GenerationRequest
from toka_engine.server.stops import StopStrings
from toka_engine.slot_parameters import Sampling

_MAX_STOP_BYTES = 64 * 1024
"""The most bytes of JSON; allowed stop strings fit even if every character is written as two escapes."""
_OBFUSCATION = Lacking("this server does not pad its events", (False,))
_decode_stop = msgspec.json.Decoder(str | list[str] | None).decode


def check_shared(
    request: GenerationRequest,
    limits: Limits,
    *,
    max_tokens: int | None,
    max_tokens_field: str,
    num_logprobs: int,
    echoes: bool = False,
) -> GenerationOptions:
    """Check what the endpoints share: everything but the prompt. `echoes`: choices begin with it."""
    limits.check_model(request.model)
    stream_options = request.stream_options
    if stream_options is not None and not request.stream:
        raise invalid("stream_options", "'stream_options' needs 'stream' to be true.")
    if stream_options is not None and stream_options.include_obfuscation:
        raise lacks("stream_options.include_obfuscation", _OBFUSCATION)
    if request.return_tokens_as_token_ids and num_logprobs < 0:
        raise invalid("return_tokens_as_token_ids", "'return_tokens_as_token_ids' needs 'logprobs'.")
    prompt_logprobs = -1 if request.prompt_logprobs is None else _check_prompt_logprobs(request, limits)
    num_choices = int_in(request.n, "n", 1, limits.max_choices, 1)
    if max_tokens is not None:
        least = 0 if echoes or prompt_logprobs >= 0 else 1
        max_tokens = int_in(max_tokens, max_tokens_field, least, limits.max_request_tokens, 1)
    truncation = request.truncate_prompt_tokens
    if truncation is not None:
        truncation = _check_truncation(truncation, limits, max_tokens or 1)
    return GenerationOptions(
        num_choices=num_choices,
        max_tokens=max_tokens,
        max_tokens_field=max_tokens_field,
        sampling=_check_sampling(request, limits, num_logprobs),
        stops=None if request.stop is NULL else _check_stops(request.stop),
        ignores_eos=bool(request.ignore_eos),
        is_streamed=bool(request.stream),
        includes_usage=bool(stream_options and stream_options.include_usage),
        names_token_ids=bool(request.return_tokens_as_token_ids),
        reports_usage_each=bool(stream_options and stream_options.continuous_usage_stats),
        returns_token_ids=bool(request.return_token_ids),
        adds_special_tokens=request.add_special_tokens,
        truncation=truncation,
        grammar=read_grammar(request),
        priority=_check_priority(request),
        timeout_s=request.timeout_s or 0.0,
        rules=check_token_rules(request, limits.vocab_size, limits.encode_word),
        keeps_stop=bool(request.include_stop_str_in_output),
        shows_special=request.skip_special_tokens is False,
        best_of=0 if request.best_of is None else _check_best_of(request, num_choices, limits),
        prompt_logprobs=prompt_logprobs,
        echo_logprobs=num_logprobs if echoes else -1,
    )


def _check_best_of(request: GenerationRequest, num_choices: int, limits: Limits) -> int:
    """Return how many choices are sampled; 0: as many as are returned."""
    best_of = int_in(request.best_of, "best_of", 1, limits.max_choices, num_choices)
    if best_of < num_choices:
        raise invalid("best_of", f"'best_of' must be at least 'n', which is {num_choices}.", "invalid_value")
    if best_of > num_choices and request.stream:
        raise invalid("best_of", "'best_of' above 'n' excludes 'stream': the best is known at the end.")
    return best_of if best_of > num_choices else 0


def _check_prompt_logprobs(request: GenerationRequest, limits: Limits) -> int:
    if request.stream:
        raise invalid("prompt_logprobs", "'prompt_logprobs' excludes 'stream'.")
    return int_in(request.prompt_logprobs, "prompt_logprobs", 0, limits.max_top_logprobs(), 0)


def _check_sampling(request: GenerationRequest, limits: Limits, num_logprobs: int) -> Sampling:
    """Return the sampling parameters; the model's own where a field is left out."""
    # Written out: each call would be a part of every request.
    defaults = limits.defaults
    temperature = defaults.temperature if request.temperature is None else request.temperature
    top_p = defaults.top_p if request.top_p is None else request.top_p
    top_k = defaults.top_k
    if request.top_k is not None:
        top_k = max(0, int_in(request.top_k, "top_k", -1, limits.vocab_size, top_k))
    if top_p == 0.0:  # the smallest nucleus is the most likely token
        top_p, temperature = 1.0, 0.0
    return Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=defaults.min_p if request.min_p is None else request.min_p,
        seed=-1 if request.seed is None else request.seed & (2**63 - 1),
        num_logprobs=num_logprobs,
        presence_penalty=0.0 if request.presence_penalty is None else request.presence_penalty,
        frequency_penalty=0.0 if request.frequency_penalty is None else request.frequency_penalty,
        repetition_penalty=(
            defaults.repetition_penalty if request.repetition_penalty is None else request.repetition_penalty
        ),
    )


def _check_truncation(given: int, limits: Limits, max_tokens: int) -> int:
    """Return how many tokens of a prompt are kept."""
    name, room = "truncate_prompt_tokens", max(1, limits.max_request_tokens - max_tokens)
    if given == 0:
        raise invalid(name, f"'{name}' must be -1, or at least 1.", "invalid_value")
    return room if given == -1 else int_in(given, name, 1, limits.max_request_tokens - 1, 1)


def _check_priority(request: GenerationRequest) -> int:
    """Return the number by which requests are ordered; the tier `flex` is background work of its own."""
    if request.priority is not None:
        return request.priority
    return FLEX_PRIORITY if request.service_tier == "flex" else 0


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
