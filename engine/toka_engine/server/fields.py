"""The fields of a request that have no effect, by three rules.

Owns: which names are *hints*, which by their own definition change no answer (taken, and named in the answer); which
names this server knows and lacks (refused with what is lacking, unless the value asks for nothing); and what an unknown
name is told. A field with an effect stands in its endpoint's struct and in none of these tables. A null is always
absence. Pure: no I/O, no state.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

import msgspec

from toka_engine.server.errors import ApiError, invalid

Values = tuple[Any, ...]

HINTS: Final[Mapping[str, Values]] = {
    "user": (),
    "safety_identifier": (),
    "prompt_cache_key": (),
    "prompt_cache_retention": (),
    "prompt_cache_options": (),
    "verbosity": (),
    "service_tier": ("auto", "default", "flex"),
    "metadata": ({},),
    "request_id": (),
}
"""The hints, each with the values that say nothing and need not be named in the answer."""

COUNTED: Final = frozenset((*HINTS, "chat_template_kwargs", "documents", "reasoning_effort", "messages", "tools"))
"""The names under which metrics count ignored fields; all others count as `other`."""


class Lacking(NamedTuple):
    """A field that is known and not supported: what the server lacks, and the values that ask for nothing."""

    what: str
    neutral: Values = ()


_AUDIO = "this server makes text alone"
_BEAM_SEARCH = "this server samples and has no beam search"
_FUNCTIONS = "this server has no functions in their old form"

LACKING: Final[Mapping[str, Lacking]] = {
    "suffix": Lacking("this server does not fill in the middle", ("",)),
    "spaces_between_special_tokens": Lacking("this server puts no spaces between special tokens", (True, False)),
    "functions": Lacking(_FUNCTIONS, ([],)),
    "function_call": Lacking(_FUNCTIONS, ("none", "auto")),
    "modalities": Lacking(_AUDIO, (["text"],)),
    "audio": Lacking(_AUDIO),
    "prediction": Lacking("this server takes no predicted output"),
    "store": Lacking("this server keeps no chat completions", (False,)),
    "moderation": Lacking("this server does not moderate"),
    "background": Lacking("this server answers at once", (False,)),
    "conversation": Lacking("this server keeps no conversations"),
    "web_search_options": Lacking("this server has no web search"),
    "chat_template": Lacking("this server renders messages by the model's own template"),
    "mm_processor_kwargs": Lacking("this server reads text alone", ({},)),
    "use_beam_search": Lacking(_BEAM_SEARCH, (False,)),
    "length_penalty": Lacking(_BEAM_SEARCH, (1.0,)),
    "early_stopping": Lacking(_BEAM_SEARCH, (False,)),
    "detokenize": Lacking("this server always answers with text", (True,)),
    "logits_processors": Lacking("this server runs no code of a request", ([],)),
    "cache_salt": Lacking("this server has one prefix cache for all requests"),
}

_MEANT: Final[Mapping[str, str]] = {
    "max_length": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "max_tokens_to_sample": "max_tokens",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "num_return_sequences": "n",
    "num_completions": "n",
    "input": "prompt",
    "inputs": "prompt",
    "repeat_penalty": "repetition_penalty",
    "random_seed": "seed",
    "stop_sequences": "stop",
    "stops": "stop",
}
"""The names that other servers have for fields of ours."""
_MAX_NEUTRAL_BYTES = 256
_MAX_NAME = 100
"""A longer name is not compared with ours, and is shortened where it is shown."""


class Sorted(NamedTuple):
    """A body's fields without those that are absent: nulls, neutral values, and unknown ones that are only reported."""

    kept: dict[str, msgspec.Raw]
    reported: list[str]


def sort_fields(parts: Mapping[str, msgspec.Raw], known: Iterable[str], *, reports_unknown: bool) -> Sorted:
    """Leave out the fields of `parts` that are absent by their values. Raises a 400 for the first one that is not in
    `known`, unless unknown ones are to be reported.
    """
    names = frozenset(known)
    found = Sorted({}, [])
    for name, raw in parts.items():
        if memoryview(raw).nbytes == 4 and bytes(raw) == b"null":
            continue
        if name in names:
            found.kept[name] = raw
        elif name in LACKING and _is_neutral(raw, LACKING[name].neutral):
            continue
        elif reports_unknown:
            found.reported.append(name)
        else:
            raise refuse_unknown(name, names)
    return found


def refuse_unknown(name: str, known: Iterable[str], prefix: str = "") -> ApiError:
    """Return the 400 of a field that has no effect here: what is lacking, or which name was probably meant."""
    shown = prefix + (name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}...")
    if not prefix and name in LACKING:
        return lacks(name, LACKING[name])
    meant = _find_meant(name, known)
    advice = f" Did you mean '{prefix}{meant}'?" if meant else ""
    return invalid(shown, f"Unknown field: '{shown}'.{advice}", "unknown_parameter")


def lacks(name: str, lacking: Lacking) -> ApiError:
    """Return the 400 of a field that is known and not supported."""
    values = " or ".join(dict.fromkeys(msgspec.json.encode(value).decode() for value in lacking.neutral[:2]))
    advice = f"it may only be {values}, or left out" if lacking.neutral else "leave it out"
    return invalid(name, f"'{name}' is not supported: {lacking.what}; {advice}.", "unsupported_parameter")


def given_hints(request: msgspec.Struct, names: Iterable[str]) -> list[str]:
    """Return which hints of `request`, of those in `names`, ask for something."""
    return [
        name
        for name in names
        if (value := getattr(request, name)) is not None and not any(_equal(value, plain) for plain in HINTS[name])
    ]


def _find_meant(name: str, known: Iterable[str]) -> str | None:
    names = list(known)
    if len(name) > _MAX_NAME:
        return None
    if _MEANT.get(name.lower()) in names:
        return _MEANT[name.lower()]
    found = difflib.get_close_matches(name.lower().replace("-", "_"), names, 1, 0.75)
    return found[0] if found else None


def _is_neutral(raw: msgspec.Raw, neutral: Values) -> bool:
    if not neutral or memoryview(raw).nbytes > _MAX_NEUTRAL_BYTES:
        return False
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return any(_equal(value, plain) for plain in neutral)


def _equal(value: Any, plain: Any) -> bool:
    """Compare as JSON does, where false is not 0."""
    return bool(value == plain) and isinstance(value, bool) == isinstance(plain, bool)
