"""Bad requests: each is refused by name, in OpenAI's error shape, before any work, and others go on."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import pytest

from tests.unit.server.conftest import SENTENCE, chat_body, completion_body
from tests.unit.server.harness import INFO, MODEL, RunningServer

_COMPLETIONS = "/v1/completions"
_CHAT = "/v1/chat/completions"
_WRONG_NUMBERS: dict[str, Any] = {
    "2^31": 2**31,
    "2^63": 2**63,
    "2^64": 2**64,
    "10^40": 10**40,
    "1e308": 1e308,
    "text": "1",
    "true": True,
    "list": [],
    "object": {},
}
_BOUNDS: dict[str, list[Any]] = {
    "n": [-1, 0, 1025, 1.5],
    "max_tokens": [-1, 0, INFO.max_request_tokens, INFO.max_request_tokens + 1, 1.5],
    "temperature": [-1, -0.01, 2.01],
    "top_p": [-1, -0.01, 1.01],
    "top_k": [-2, INFO.vocab_size + 1, 1.5],
    "min_p": [-0.01, 1.01],
    "frequency_penalty": [-2.01, 2.01],
    "presence_penalty": [-2.01, 2.01],
    "repetition_penalty": [-1, 0, 0.001, 100.1],
    "timeout_s": [-1, 0, 86400.1],
    "logprobs": [-1, 21, 1.5],
    "seed": [2**63 + 1, -(2**63) - 1, 1.5],
}
_UNSUPPORTED: dict[str, list[Any]] = {
    "suffix": ["end", 1],
}
_UNSUPPORTED_CHAT: dict[str, list[Any]] = {
    "functions": [[{"name": "f"}]],
    "function_call": [{"name": "f"}],
    "modalities": [["audio"]],
    "audio": [{"voice": "x"}],
    "prediction": [{"type": "content"}],
    "service_tier": [1],
    "store": [True, 0],
    "metadata": ["a", []],
    "web_search_options": [{}],
    "chat_template": ["{{ x }}"],
    "top_logprobs": [1],
}


def _numeric_cases() -> list[Any]:
    cases = []
    for field, wrong in _BOUNDS.items():
        values = {str(value): value for value in wrong}
        values |= {name: value for name, value in _WRONG_NUMBERS.items() if not (field == "seed" and name == "2^31")}
        cases += [pytest.param(field, value, id=f"{field}={name}") for name, value in values.items()]
    return cases


def _cases(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(field, value, id=f"{field}={json.dumps(value)[:30]}")
        for field, values in table.items()
        for value in values
    ]


def _assert_refused(status: int, answer: Any, param: str | None, expected: int = 400) -> None:
    assert status == expected, answer
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["param"] == param, answer
    assert answer["error"]["type"] == "invalid_request_error"
    if param is not None:
        assert param.split("[")[0] in answer["error"]["message"]


@pytest.fixture(autouse=True)
def _work_and_others_are_untouched(server: RunningServer) -> Any:
    """After each case: nothing was submitted for it, and the next request is served."""
    yield
    assert server.manager.submits == []
    status, answer = server.post(_COMPLETIONS, completion_body())
    assert (status, answer["choices"][0]["text"]) == (200, SENTENCE)


@pytest.mark.parametrize(("field", "value"), _numeric_cases())
def test_a_wrong_number_is_refused_by_name(server: RunningServer, field: str, value: Any) -> None:
    _assert_refused(*server.post(_COMPLETIONS, completion_body(**{field: value})), field)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize(
    "field", ["temperature", "top_p", "min_p", "max_tokens", "n", "seed", "frequency_penalty", "repetition_penalty"]
)
def test_a_number_that_is_none_is_refused_by_name(server: RunningServer, field: str, constant: str) -> None:
    body = json.dumps(completion_body(**{field: 777777})).replace("777777", constant).encode()
    _assert_refused(*server.post(_COMPLETIONS, body), field)


@pytest.mark.parametrize(("field", "value"), _cases(_UNSUPPORTED))
def test_an_unsupported_field_is_refused_by_name(server: RunningServer, field: str, value: Any) -> None:
    _assert_refused(*server.post(_COMPLETIONS, completion_body(**{field: value})), field)


@pytest.mark.parametrize(("field", "value"), _cases(_UNSUPPORTED_CHAT))
def test_an_unsupported_chat_field_is_refused_by_name(server: RunningServer, field: str, value: Any) -> None:
    _assert_refused(*server.post(_CHAT, chat_body(**{field: value})), field)


@pytest.mark.parametrize(
    "field", ["foo", "Temperature", "max_token", "prompts", "stop_token_ids", "guided_json", "extra_body", ""]
)
@pytest.mark.parametrize("path", [_COMPLETIONS, _CHAT])
def test_an_unknown_field_is_refused_by_name(server: RunningServer, path: str, field: str) -> None:
    body = completion_body() if path == _COMPLETIONS else chat_body()
    _assert_refused(*server.post(path, {**body, field: 1}), field)


_PROMPTS: dict[str, Any] = {
    "empty": "",
    "no-prompts": [],
    "one-empty-text": ["a", ""],
    "one-empty-list": [[1], []],
    "null": None,
    "number": 5,
    "object": {},
    "true": True,
    "texts-and-ids": ["a", 1],
    "ids-and-texts": [1, "a"],
    "ids-and-lists": [1, [1]],
    "lists-and-ids": [[1], 1],
    "negative-id": [5, -1],
    "id-of-vocabulary-size": [INFO.vocab_size],
    "id-2^31": [2**31],
    "id-2^63": [2**63],
    "id-10^30": [[10**30]],
    "id-float": [1.5],
    "id-true": [True],
    "id-null": [None],
    "nested-too-deep": [[[1]]],
    "ids-that-fill-the-context": [5] * INFO.max_request_tokens,
    "a-million-ids": [5] * 1_000_000,
    "text-too-long": "word " * 3000,
    "text-of-4-MiB": "a" * (4 << 20),
    "too-many-prompts": [[5]] * 1025,
    "too-many-texts": ["a"] * 1025,
    "a-thousand-long-texts": ["hello wor " * 2000] * 1000,
}


@pytest.mark.parametrize("prompt", _PROMPTS.values(), ids=_PROMPTS.keys())
def test_a_wrong_prompt_is_refused(server: RunningServer, prompt: Any) -> None:
    status, answer = server.post(_COMPLETIONS, completion_body(prompt=prompt))
    assert answer["error"]["param"].split("[")[0] == "prompt"
    _assert_refused(status, answer, answer["error"]["param"])


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


_MESSAGES: dict[str, tuple[Any, str]] = {
    "none": ([], "messages"),
    "null": (None, "messages"),
    "text": ("Hi", "messages"),
    "object": ({}, "messages"),
    "text-inside": (["Hi"], "messages[0]"),
    "no-role": ([{"content": "x"}], "messages[0].role"),
    "no-content": ([{"role": "user"}], "messages[0].content"),
    "null-content": ([{"role": "assistant", "content": None}], "messages[0].content"),
    "number-content": ([{"role": "user", "content": 5}], "messages[0].content"),
    "unknown-role": ([{"role": "king", "content": "x"}], "messages[0].role"),
    "empty-role": ([{"role": "", "content": "x"}], "messages[0].role"),
    "function-role": ([{"role": "function", "content": "x"}], "messages[0].role"),
    "number-name": ([{"role": "user", "content": "x", "name": 5}], "messages[0].name"),
    "long-name": ([{"role": "user", "content": "x", "name": "a" * 257}], "messages[0].name"),
    "number-reasoning": ([{"role": "user", "content": "x", "reasoning": 5}], "messages[0].reasoning"),
    "tool-calls": ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], "messages[0].tool_calls[0].type"),
    "tool-call-id": ([{"role": "tool", "content": "x", "tool_call_id": 1}], "messages[0].tool_call_id"),
    "large-further-key": ([{"role": "user", "content": "x", "foo": "x" * 65536}], "messages[0]"),
    "many-in-further-key": ([{"role": "user", "content": "x", "foo": [0] * 65536}], "messages[0]"),
    "deep-further-key": ([{"role": "user", "content": "x", "foo": _nested(100)}], "messages[0]"),
    "large-further-keys": ([{"role": "user", "content": "x", "foo": "x" * 60000}] * 20, "messages"),
    "image": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        "messages[0].content[0].type",
    ),
    "audio": ([{"role": "user", "content": [{"type": "input_audio"}]}], "messages[0].content[0].type"),
    "part-without-text": ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    "part-without-type": ([{"role": "user", "content": [{"text": "x"}]}], "messages[0].content[0].type"),
    "part-of-number": ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "messages[0].content[0].text"),
    "part-of-refusal": (
        [{"role": "user", "content": [{"type": "refusal", "text": "x"}]}],
        "messages[0].content[0].refusal",
    ),
    "part-of-text": ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
    "too-long": ([{"role": "user", "content": "word " * 3000}], "messages"),
    "three-thousand": ([{"role": "user", "content": "x"}] * 3000, "messages"),
    "of-4-MiB": ([{"role": "user", "content": "a" * (4 << 20)}], "messages"),
}


@pytest.mark.parametrize(("messages", "param"), _MESSAGES.values(), ids=_MESSAGES.keys())
def test_wrong_messages_are_refused_by_name(server: RunningServer, messages: Any, param: str) -> None:
    _assert_refused(*server.post(_CHAT, chat_body(messages=messages)), param)


_OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "stop-empty": ({"stop": ""}, "stop"),
    "stop-empty-inside": ({"stop": ["a", ""]}, "stop"),
    "stop-thousand": ({"stop": [str(number) for number in range(1000)]}, "stop"),
    "stop-long": ({"stop": "x" * 257}, "stop"),
    "stop-number": ({"stop": 5}, "stop"),
    "stop-numbers": ({"stop": [5]}, "stop[0]"),
    "stream-text": ({"stream": "true"}, "stream"),
    "stream-number": ({"stream": 1}, "stream"),
    "stream-options-alone": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "stream-options-list": ({"stream": True, "stream_options": []}, "stream_options"),
    "stream-options-unknown": ({"stream": True, "stream_options": {"foo": True}}, "stream_options.foo"),
    "obfuscation": (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
    ),
    "ignore-eos-number": ({"ignore_eos": 1}, "ignore_eos"),
    "user-number": ({"user": 1}, "user"),
    "token-ids-without-logprobs": ({"return_tokens_as_token_ids": True}, "return_tokens_as_token_ids"),
    "token-ids-number": ({"logprobs": 0, "return_tokens_as_token_ids": 1}, "return_tokens_as_token_ids"),
    "echo-text": ({"echo": "yes"}, "echo"),
    "model-null": ({"model": None}, "model"),
    "model-number": ({"model": 1}, "model"),
    "too-many-choices": ({"prompt": [[5], [6]], "n": 1000}, "n"),
    "logprobs-bomb": ({"n": 1024, "max_tokens": 1000, "logprobs": 20}, "logprobs"),
}


@pytest.mark.parametrize(("fields", "param"), _OTHERS.values(), ids=_OTHERS.keys())
def test_other_wrong_fields_are_refused_by_name(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    _assert_refused(*server.post(_COMPLETIONS, completion_body(**fields)), param)


def test_two_different_limits_are_refused(server: RunningServer) -> None:
    _assert_refused(*server.post(_CHAT, chat_body(max_tokens=5, max_completion_tokens=6)), "max_tokens")
    _assert_refused(*server.post(_CHAT, chat_body(max_completion_tokens=2048)), "max_completion_tokens")


@pytest.mark.parametrize("name", ["", "gpt-4", "SMOLLM2", "x" * 100_000, "../../etc/passwd", "smollm2\x00"])
def test_another_model_is_a_404(server: RunningServer, name: str) -> None:
    status, answer = server.post(_COMPLETIONS, completion_body(model=name))
    _assert_refused(status, answer, "model", 404)
    assert answer["error"]["code"] == "model_not_found"
    assert len(answer["error"]["message"]) < 200


_BODIES: dict[str, bytes] = {
    "empty": b"",
    "space": b" ",
    "half": b'{"model":"smollm2"',
    "text": b"hello",
    "null": b"null",
    "list": b"[]",
    "number": b"5",
    "string": b'"x"',
    "two-values": b'{"model":"smollm2","prompt":"a"}{}',
    "trailing-comma": b'{"model":"smollm2",}',
    "single-quotes": b"{'model':'smollm2'}",
    "latin-1": '{"model":"é"}'.encode("latin-1"),
    "utf-16": '{"model":"smollm2"}'.encode("utf-16"),
    "nul-bytes": b"\x00" * 100,
    "deep-lists": b"[" * 200_000,
    "deep-value": b'{"logit_bias":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep-objects": b'{"logit_bias":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
}


@pytest.mark.parametrize("body", _BODIES.values(), ids=_BODIES.keys())
def test_a_body_that_is_no_request_is_refused(server: RunningServer, body: bytes) -> None:
    _assert_refused(*server.post(_COMPLETIONS, body), None)


@pytest.mark.parametrize("field", ["prompt", "stop", "user", "model"])
@pytest.mark.parametrize("half", ["\\ud800", "\\udfff", "a\\ud83d!"])
def test_half_a_surrogate_pair_is_refused_by_name(server: RunningServer, field: str, half: str) -> None:
    body = json.dumps(completion_body(**{field: "HALF"})).replace("HALF", half).encode()
    _assert_refused(*server.post(_COMPLETIONS, body), field)


@pytest.mark.parametrize("text", ["a\x00b", "\ufeff", "\u202e", "\U0010ffff", "\r\n\r\n", "<|im_start|>"])
def test_odd_text_is_served(server: RunningServer, text: str) -> None:
    assert server.post(_COMPLETIONS, completion_body(prompt=text, stop=text, user=text))[0] == 200
    server.manager.submits.clear()


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "json", "application/jsonx"])
def test_another_content_type_is_a_415(server: RunningServer, kind: str | None) -> None:
    headers = {"content-type": kind} if kind else {}
    status, _, answer = server.request("POST", _COMPLETIONS, json.dumps(completion_body()).encode(), headers)
    _assert_refused(status, json.loads(answer), None, 415)


def test_a_content_type_with_a_charset_is_taken(server: RunningServer) -> None:
    status, _ = server.post(_COMPLETIONS, completion_body(), {"content-type": "Application/JSON; charset=utf-8"})
    assert status == 200
    server.manager.submits.clear()


@pytest.mark.parametrize(
    "path", ["/nothing", "/v1", "/v1/", "/v1/completions/", "/v1/embeddings", "/v2/models", "/%00", "/é"]
)
def test_another_path_is_a_404(server: RunningServer, path: str) -> None:
    import urllib.parse

    status, _, answer = server.request("GET", urllib.parse.quote(path, safe="/%"))
    _assert_refused(status, json.loads(answer), None, 404)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *((method, path) for method in ("GET", "PUT", "DELETE", "PATCH") for path in (_COMPLETIONS, _CHAT)),
        *(("POST", path) for path in ("/v1/models", "/ping", "/livez", "/readyz", "/metrics")),
    ],
)
def test_another_method_is_a_405(server: RunningServer, method: str, path: str) -> None:
    status, headers, answer = server.request(method, path)
    _assert_refused(status, json.loads(answer), None, 405)
    assert headers["allow"] in ("GET, HEAD", "POST")


# ---------------------------------------------------------------- errors that say what to do


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "GZIP", "gzip, identity", "x" * 1000])
@pytest.mark.parametrize("path", [_COMPLETIONS, _CHAT])
def test_a_compressed_body_is_a_415_that_names_the_encoding(server: RunningServer, path: str, encoding: str) -> None:
    sent = {"content-type": "application/json", "content-encoding": encoding}
    status, headers, answer = server.request("POST", path, gzip.compress(json.dumps(chat_body()).encode()), sent)
    _assert_refused(status, json.loads(answer), None, 415)
    assert encoding.lower()[:50] in json.loads(answer)["error"]["message"]
    assert headers["accept-encoding"] == "identity"


def test_a_body_of_identity_encoding_is_taken(server: RunningServer) -> None:
    assert server.post(_COMPLETIONS, completion_body(), {"content-encoding": "identity"})[0] == 200
    server.manager.submits.clear()


_TEXT = json.dumps(completion_body())
_NO_UTF_8: dict[str, tuple[bytes, str]] = {
    "bom": (_TEXT.encode("utf-8-sig"), "byte order mark"),
    "utf-16": (_TEXT.encode("utf-16"), "UTF-16"),
    "utf-16-le": (_TEXT.encode("utf-16-le"), "UTF-16"),
    "utf-16-be": (_TEXT.encode("utf-16-be"), "UTF-16"),
    "utf-16-be-bom": (b"\xfe\xff" + _TEXT.encode("utf-16-be"), "UTF-16"),
    "utf-32": (_TEXT.encode("utf-32"), "UTF-32"),
    "utf-32-be-bom": (b"\0\0\xfe\xff" + _TEXT.encode("utf-32-be"), "UTF-32"),
    "gzip": (gzip.compress(_TEXT.encode()), "gzip"),
    **{f"deflate-{level}": (zlib.compress(_TEXT.encode(), level), "deflate") for level in (0, 6, 9)},
}


@pytest.mark.parametrize(("body", "word"), _NO_UTF_8.values(), ids=_NO_UTF_8)
def test_a_body_that_is_no_utf_8_is_named_for_what_it_is(server: RunningServer, body: bytes, word: str) -> None:
    status, answer = server.post(_COMPLETIONS, body)
    _assert_refused(status, answer, None)
    assert word in answer["error"]["message"]


@pytest.mark.parametrize("path", [_COMPLETIONS, _CHAT, "/v1/models/gpt-4"])
def test_an_unknown_model_names_what_is_served(server: RunningServer, path: str) -> None:
    if path.startswith("/v1/models"):
        status, _, raw = server.request("GET", path)
        answer = json.loads(raw)
    else:
        status, answer = server.post(path, (completion_body if path == _COMPLETIONS else chat_body)(model="gpt-4"))
    _assert_refused(status, answer, "model", 404)
    assert f"'{MODEL}'" in answer["error"]["message"]


_MISTAKEN = {
    "/v1/completions/": _COMPLETIONS,
    "/v1//completions": _COMPLETIONS,
    "//v1/completions": _COMPLETIONS,
    "/completions": _COMPLETIONS,
    "/chat/completions": _CHAT,
    "/chat/completions/": _CHAT,
    "/v1/v1/chat/completions": _CHAT,
    "/api/v1/chat/completions": _CHAT,
    "/V1/Models": "/v1/models",
    "/v1/models/": "/v1/models",
    "/models": "/v1/models",
    "/v1/metrics": "/metrics",
    "/ping/": "/ping",
}


@pytest.mark.parametrize(("path", "right"), _MISTAKEN.items())
def test_a_mistaken_path_names_the_right_one(server: RunningServer, path: str, right: str) -> None:
    status, _, answer = server.request("POST", path)
    _assert_refused(status, json.loads(answer), None, 404)
    assert json.loads(answer)["error"]["message"].endswith(f"Did you mean {right}?")


@pytest.mark.parametrize(
    "path", ["/nothing", "/v1", "/v1/embeddings", "/v1/completions/x", "/" + "a" * 5000, "/v1/completion"]
)
def test_a_path_like_no_other_suggests_nothing(server: RunningServer, path: str) -> None:
    status, _, answer = server.request("GET", path)
    _assert_refused(status, json.loads(answer), None, 404)
    assert "mean" not in json.loads(answer)["error"]["message"]


def test_an_unsupported_field_says_whether_another_value_would_do(server: RunningServer) -> None:
    for fields, advice in (
        ({"functions": [{}]}, "it may only be [], or left out"),
        ({"function_call": "f"}, 'it may only be "none" or "auto", or left out'),
        ({"store": True}, "it may only be false, or left out"),
        ({"prediction": {}}, "leave it out"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "it may only be false, or left out"),
        ({"messages": [{"role": "user", "content": "x", "audio": "1"}]}, "leave it out"),
    ):
        status, answer = server.post(_CHAT, chat_body(**fields))
        assert status == 400
        assert advice in answer["error"]["message"]


def test_a_body_beyond_the_limit_is_a_413(server: RunningServer) -> None:
    status, answer = server.post(_COMPLETIONS, b" " * (32 * 1024 * 1024 + 1))
    _assert_refused(status, answer, None, 413)
