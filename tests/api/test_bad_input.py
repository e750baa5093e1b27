"""Bad requests to the real engine: refused in OpenAI's error shape with the field's name, the others untouched."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.engine_process import EngineProcess

COMPLETION = {"model": "m", "prompt": "Hi", "max_tokens": 2}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}

BAD_NUMBERS = (-(2**63), -1.5, 2**31, 2**63, 1e308, "1", True, [], {})
NUMERIC = ("max_tokens", "n", "temperature", "top_p", "top_k", "min_p", "seed", "logprobs")
FIELDS: list[tuple[str, Any]] = [
    *(
        (field, value)
        for field in NUMERIC
        for value in BAD_NUMBERS
        if not (field == "seed" and value in (-(2**63), 2**31))  # these are seeds
    ),
    ("prompt", ""),
    ("prompt", []),
    ("prompt", [[]]),
    ("prompt", [-1]),
    ("prompt", [10_000_000]),
    ("prompt", [1, "a"]),
    ("prompt", None),
    ("prompt", 5),
    ("prompt", "word " * 20_000),
    ("max_tokens", 0),
    ("max_tokens", 1_000_000),
    ("n", 0),
    ("n", 1_000_000),
    ("stop", [""]),
    ("stop", ["x"] * 1000),
    ("stop", 5),
    ("model", "another"),
    ("model", None),
    ("stream", "yes"),
    ("stream_options", {"include_usage": True}),
    ("frequency_penalty", 2.5),
    ("presence_penalty", -3),
    ("repetition_penalty", 0),
    ("logit_bias", {"x": 1}),
    ("allowed_token_ids", []),
    ("min_tokens", -1),
    ("prompt_logprobs", 1000),
    ("suffix", "end"),
    ("best_of", 0),
    ("guided_json", 5),
    ("unheard_of", 1),
]
CHAT_FIELDS: list[tuple[str, Any]] = [
    ("messages", []),
    ("messages", "Hi"),
    ("messages", [{"role": "wizard", "content": "Hi"}]),
    ("messages", [{"role": "user"}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    ("functions", [{"name": "f"}]),
    ("response_format", {"type": "xml"}),
    ("chat_template", "{{ 1 }}"),
    ("top_logprobs", 2),
    ("max_tokens", 0),
]


def post(engine: EngineProcess, path: str, body: bytes, content_type: str = "application/json") -> tuple[int, Any]:
    request = urllib.request.Request(engine.url + path, body, {"Content-Type": content_type})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def assert_refused(status: int, body: Any, field: str | None) -> None:
    assert 400 <= status < 500, body
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    if field is not None:
        assert str(body["error"]["param"]).startswith(field), body


@pytest.mark.parametrize(("field", "value"), FIELDS, ids=lambda part: repr(part)[:24])
def test_a_bad_completion_field_is_refused_by_its_name(engine: EngineProcess, field: str, value: Any) -> None:
    assert_refused(*post(engine, "/v1/completions", json.dumps({**COMPLETION, field: value}).encode()), field)


@pytest.mark.parametrize(("field", "value"), CHAT_FIELDS, ids=lambda part: repr(part)[:24])
def test_a_bad_chat_field_is_refused_by_its_name(engine: EngineProcess, field: str, value: Any) -> None:
    assert_refused(*post(engine, "/v1/chat/completions", json.dumps({**CHAT, field: value}).encode()), field)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_none_is_refused_by_its_field(engine: EngineProcess, number: str) -> None:
    body = json.dumps(COMPLETION)[:-1] + f', "temperature": {number}}}'
    assert_refused(*post(engine, "/v1/completions", body.encode()), "temperature")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a":' * 100_000, b"{}"])
def test_a_body_that_is_no_request_is_refused(engine: EngineProcess, body: bytes) -> None:
    assert_refused(*post(engine, "/v1/completions", body), None)


def test_another_content_type_is_refused(engine: EngineProcess) -> None:
    status, body = post(engine, "/v1/completions", json.dumps(COMPLETION).encode(), "text/plain")
    assert status == 415
    assert_refused(status, body, None)


def test_an_unknown_path_and_method_are_refused_in_the_same_shape(engine: EngineProcess) -> None:
    status, body = post(engine, "/v1/nothing", b"{}")
    assert status == 404
    assert_refused(status, body, None)
    status, body = post(engine, "/v1/models", b"{}")
    assert status == 405
    assert_refused(status, body, None)


def test_the_sdk_raises_its_own_error_with_the_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.completions.create(model="m", prompt="Hi", max_tokens=-1)
    assert refusal.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="another", prompt="Hi")


def test_bad_requests_leave_the_others_untouched(engine: EngineProcess, client: openai.OpenAI) -> None:
    def ask(_: int) -> str:
        return client.completions.create(model="m", prompt="The sky is", max_tokens=24, temperature=0).choices[0].text

    alone = ask(0)
    bodies = [json.dumps({**COMPLETION, field: value}).encode() for field, value in FIELDS]
    with ThreadPoolExecutor(8) as pool:
        good = pool.map(ask, range(4))
        bad = pool.map(lambda body: post(engine, "/v1/completions", body)[0], bodies)
        assert set(good) == {alone}
        assert all(400 <= status < 500 for status in bad)
