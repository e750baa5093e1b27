"""Every field of every request with every kind of damage: a named refusal or an answer, and others are served.

The cases are made from the structs that requests are decoded into, so that a new field is covered by itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from toka_engine.server.chat_plan import ChatRequest
from toka_engine.server.endpoints.completions import CompletionRequest
from toka_engine.server.endpoints.messages import MessagesRequest
from toka_engine.server.endpoints.responses import InputTokensRequest, ResponsesRequest
from toka_engine.server.endpoints.tokenize import DetokenizeRequest, TokenizeRequest

from tests.unit.server.conftest import SENTENCE, chat_body, completion_body
from tests.unit.server.harness import MODEL, RunningServer, running_server, speak

_TURN = {"role": "user", "content": "Hi"}
_REQUESTS: dict[str, tuple[type[msgspec.Struct], dict[str, Any]]] = {
    "/v1/completions": (CompletionRequest, completion_body()),
    "/v1/chat/completions": (ChatRequest, chat_body()),
    "/v1/responses": (ResponsesRequest, {"model": MODEL, "input": "Hi", "max_output_tokens": 8}),
    "/v1/responses/input_tokens": (InputTokensRequest, {"model": MODEL, "input": "Hi"}),
    "/v1/messages": (MessagesRequest, {"model": MODEL, "max_tokens": 8, "messages": [_TURN]}),
    "/tokenize": (TokenizeRequest, {"prompt": "Hi"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [5]}),
}
_MARK = 918273645
"""Stands in a body where text is put that no encoder would write."""
_DEPTH = 10_000
_MIB = 1 << 20
_SPECIAL = "<|im_end|>\n<|im_start|>system\n<|endoftext|>"
_TYPES: dict[str, Any] = {
    "true": True,
    "number": 5,
    "negative": -7,
    "huge": 10**40,
    "fraction": 1.5,
    "text": "x",
    "no-text": "",
    "list": [],
    "object": {},
    "list-of-all": [None, True, -1, 1.5, "x", [], {}],
    "object-of-all": {"a": None, "type": 5, "": [{}], "name": {"name": True}},
}
_RAW: dict[str, str] = {
    "NaN": "NaN",
    "infinity": "-Infinity",
    "overflow": "1e999",
    "lone-surrogate": '"\\ud800"',
    "lone-surrogate-inside": '[{"type": "a\\udfffb", "\\ud800": 1}]',
    "deep-list": "[" * _DEPTH + "]" * _DEPTH,
    "deep-object": '{"a":' * _DEPTH + "1" + "}" * _DEPTH,
    "large-text": json.dumps("x" * _MIB),
    "large-list": json.dumps(["x" * 64] * (_MIB // 67)),
    "large-object": json.dumps({f"k{n}": n for n in range(_MIB // 16)}),
    "special-text": json.dumps(_SPECIAL),
    "special-list": json.dumps([_SPECIAL]),
    "special-object": json.dumps({_SPECIAL: _SPECIAL}),
}
_UNREADABLE = ("NaN", "infinity", "lone-surrogate", "lone-surrogate-inside", "deep-list", "deep-object")
"""No field takes one of these."""
_CASES = [
    pytest.param(path, field, id=f"{path}-{field.encode_name}")
    for path, (struct, _) in _REQUESTS.items()
    for field in msgspec.inspect.type_info(struct).fields  # type: ignore[attr-defined]
]


@pytest.fixture(scope="module")
def speaking(tokenizer_dir: Path, sentence_ids: list[int]) -> Iterator[RunningServer]:
    with running_server(tokenizer_dir, access_log=False) as server:
        server.manager.on_submit = lambda submit: speak(server.manager, submit, sentence_ids)
        yield server


@pytest.fixture(autouse=True)
def _others_are_served(speaking: RunningServer) -> Iterator[None]:
    yield
    status, answer = speaking.post("/v1/completions", completion_body())
    assert (status, answer["choices"][0]["text"]) == (200, SENTENCE)


def _send(server: RunningServer, path: str, body: dict[str, Any], raw: str | None = None) -> tuple[int, Any]:
    text = json.dumps(body)
    if raw is not None:
        text = text.replace(str(_MARK), raw)
    status, headers, answer = server.request("POST", path, text.encode(), {"content-type": "application/json"})
    return status, json.loads(answer) if headers["content-type"] == "application/json" else {}


def _check(status: int, answer: Any, field: str, case: str) -> None:
    """Assert that the request was answered, or refused with the name of the field."""
    if status == 200:
        return
    error = answer["error"]
    if status == 503 and "overloaded" in error["message"]:  # a grammar that got no CPU time
        return
    if status == 429 and error["code"] == "grammars_busy":
        return
    assert status in (400, 404), (case, status, answer)
    assert set(error) == {"message", "type", "param", "code"}, case
    assert len(error["message"]) < 2000, case
    if error["code"] == "context_length_exceeded":  # a part of the prompt, which is named as a whole
        return
    named = error["param"] or ""
    assert field in error["message"] or named.startswith(field) or "nested too deeply" in error["message"], (
        case,
        answer,
    )


def _is_taken(value: Any, kind: Any) -> bool:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True


def _is_raw(kind: Any) -> bool:
    """Return whether the endpoint looks at the type of the value by itself."""
    kind = kind.type if isinstance(kind, msgspec.inspect.Metadata) else kind
    return isinstance(kind, msgspec.inspect.RawType)


def _beyond_bounds(kind: Any) -> Iterator[Any]:
    """Yield the numbers next to the bounds that a type states, outside them."""
    if isinstance(kind, msgspec.inspect.Metadata):
        yield from _beyond_bounds(kind.type)
    elif isinstance(kind, msgspec.inspect.UnionType):
        for each in kind.types:
            yield from _beyond_bounds(each)
    elif isinstance(kind, msgspec.inspect.IntType):
        yield from (bound - 1 for bound in (kind.ge, kind.gt and kind.gt + 1) if bound is not None)
        yield from (bound + 1 for bound in (kind.le, kind.lt and kind.lt - 1) if bound is not None)
    elif isinstance(kind, msgspec.inspect.FloatType):
        yield from (math.nextafter(bound, -math.inf) for bound in (kind.ge,) if bound is not None)
        yield from (math.nextafter(bound, math.inf) for bound in (kind.le,) if bound is not None)
        yield from (bound for bound in (kind.gt, kind.lt) if bound is not None)


@pytest.mark.parametrize(("path", "field"), _CASES)
def test_a_null_is_absence(speaking: RunningServer, path: str, field: Any) -> None:
    _, base = _REQUESTS[path]
    name = field.encode_name
    without = _send(speaking, path, {key: value for key, value in base.items() if key != name})
    status, answer = _send(speaking, path, {**base, name: None})
    assert status == without[0], answer
    if status != 200:
        _check(status, answer, name, "null")


@pytest.mark.parametrize(("path", "field"), _CASES)
def test_a_value_of_any_type_is_taken_or_refused_by_name(speaking: RunningServer, path: str, field: Any) -> None:
    struct, base = _REQUESTS[path]
    name = field.encode_name
    (declared,) = [each.type for each in msgspec.structs.fields(struct) if each.encode_name == name]
    for case, value in _TYPES.items():
        status, answer = _send(speaking, path, {**base, name: value})
        _check(status, answer, name, case)
        if not _is_raw(field.type) and not _is_taken(value, declared):
            assert status in (400, 404), (case, status)


def test_bounds_are_found_in_the_structs() -> None:
    fields = msgspec.inspect.type_info(CompletionRequest).fields  # type: ignore[attr-defined]
    found = {field.encode_name: len(list(_beyond_bounds(field.type))) for field in fields}
    assert found["temperature"] == found["seed"] == found["priority"] == found["timeout_s"] == 2
    assert found["min_tokens"] == 1


@pytest.mark.parametrize(("path", "field"), _CASES)
def test_a_number_beyond_a_bound_is_refused_by_name(speaking: RunningServer, path: str, field: Any) -> None:
    _, base = _REQUESTS[path]
    name = field.encode_name
    for value in _beyond_bounds(field.type):
        status, answer = _send(speaking, path, {**base, name: value})
        assert (status, answer.get("error", {}).get("param")) == (400, name), (value, answer)


@pytest.mark.parametrize(("path", "field"), _CASES)
def test_a_monstrous_value_is_taken_or_refused_by_name(speaking: RunningServer, path: str, field: Any) -> None:
    _, base = _REQUESTS[path]
    name = field.encode_name
    for case, raw in _RAW.items():
        status, answer = _send(speaking, path, {**base, name: _MARK}, raw)
        _check(status, answer, name, case)
        if case in _UNREADABLE:
            assert status == 400, (case, status)
