"""A request's fields by three rules: with effect, hints that the answer names, and the rest refused with advice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from toka_engine.server.chat_plan import ChatRequest
from toka_engine.server.endpoints.completions import CompletionRequest
from toka_engine.server.fields import COUNTED, HINTS, LACKING

from tests.unit.server.conftest import SENTENCE, chat_body, client_of, completion_body
from tests.unit.server.harness import MODEL, RunningServer, running_server, speak

_COMPLETIONS = "/v1/completions"
_CHAT = "/v1/chat/completions"
_HINTS: dict[str, Any] = {
    "user": "Bob",
    "safety_identifier": "ab12",
    "prompt_cache_key": "key",
    "prompt_cache_retention": "24h",
    "prompt_cache_options": {"a": 1},
    "service_tier": "priority",
    "metadata": {"a": "b"},
    "request_id": "r-1",
}


def _post(server: RunningServer, path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
    status, headers, raw = server.request("POST", path, json.dumps(body).encode(), {"content-type": "application/json"})
    return status, headers, json.loads(raw)


def _refusal(server: RunningServer, path: str, body: dict[str, Any]) -> Any:
    status, _, answer = _post(server, path, body)
    assert status == 400, answer
    return answer["error"]


@pytest.mark.parametrize("request_type", [ChatRequest, CompletionRequest])
def test_no_field_has_two_rules(request_type: type) -> None:
    fields = set(request_type.__struct_fields__)
    assert not fields & set(LACKING)
    assert set(HINTS) <= COUNTED


def test_every_hint_is_taken_by_some_endpoint() -> None:
    assert set(HINTS) <= {*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__}


# ---------------------------------------------------------------- hints


@pytest.mark.parametrize(("name", "value"), [*_HINTS.items(), ("verbosity", "low")], ids=[*_HINTS, "verbosity"])
def test_a_hint_is_taken_and_named(server: RunningServer, name: str, value: Any) -> None:
    for path, body in ((_COMPLETIONS, completion_body()), (_CHAT, chat_body())):
        if name == "verbosity" and path == _COMPLETIONS:
            continue
        status, headers, answer = _post(server, path, {**body, name: value})
        assert status == 200, answer
        assert headers["x-toka-ignored"] == name


def test_hints_are_named_in_a_streams_head_and_counted(server: RunningServer) -> None:
    body = json.dumps(chat_body(stream=True, **_HINTS)).encode()
    status, headers, _ = server.request("POST", _CHAT, body, {"content-type": "application/json"})
    assert status == 200
    assert set(headers["x-toka-ignored"].split(",")) == set(_HINTS)
    metrics = server.request("GET", "/metrics")[2].decode()
    assert 'toka_request_fields_ignored_total{field="service_tier"}' in metrics


def test_a_hint_that_asks_for_nothing_is_not_named(server: RunningServer) -> None:
    for fields in ({"service_tier": "auto"}, {"service_tier": "default"}, {"metadata": {}}, {"user": None}, {}):
        status, headers, _ = _post(server, _CHAT, chat_body(**fields))
        assert status == 200
        assert "x-toka-ignored" not in headers


@pytest.mark.parametrize("name", HINTS)
def test_a_hint_of_a_wrong_type_is_refused_by_name(server: RunningServer, name: str) -> None:
    assert _refusal(server, _CHAT, chat_body(**{name: 5}))["param"] == name


# ---------------------------------------------------------------- null and neutral values


@pytest.mark.parametrize(
    "name", sorted({*ChatRequest.__struct_fields__, *LACKING, "foo", "guided_json"} - {"model", "messages"})
)
def test_a_null_is_absence_in_chat(server: RunningServer, name: str) -> None:
    status, headers, answer = _post(server, _CHAT, chat_body(**{name: None}))
    assert status == 200, answer
    assert answer["choices"][0]["message"]["content"] == SENTENCE
    assert "x-toka-ignored" not in headers


@pytest.mark.parametrize("name", sorted({*CompletionRequest.__struct_fields__, *LACKING} - {"model", "prompt"}))
def test_a_null_is_absence_in_completions(server: RunningServer, name: str) -> None:
    status, _, answer = _post(server, _COMPLETIONS, completion_body(**{name: None}))
    assert status == 200, answer


def test_a_null_in_place_of_a_required_field_is_its_absence(server: RunningServer) -> None:
    for path, body, name in (
        (_CHAT, chat_body(model=None), "model"),
        (_CHAT, chat_body(messages=None), "messages"),
        (_COMPLETIONS, completion_body(model=None), "model"),
    ):
        error = _refusal(server, path, body)
        assert (error["param"], error["code"]) == (name, "missing_required_parameter")


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, lacking in LACKING.items() for value in lacking.neutral]
)
def test_a_value_that_asks_for_nothing_is_taken(server: RunningServer, name: str, value: Any) -> None:
    status, headers, answer = _post(server, _CHAT, chat_body(**{name: value}))
    assert status == 200, answer
    assert "x-toka-ignored" not in headers


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", LACKING)
def test_a_field_that_is_lacking_is_refused_with_what_the_server_lacks(server: RunningServer, name: str) -> None:
    error = _refusal(server, _CHAT, chat_body(**{name: {"odd": [1, "x"]}}))
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    assert LACKING[name].what in error["message"]


@pytest.mark.parametrize(
    ("wrong", "meant"),
    {
        "max_token": "max_tokens",
        "maxTokens": "max_tokens",
        "max_new_tokens": "max_tokens",
        "Temperature": "temperature",
        "top-p": "top_p",
        "stop_sequences": "stop",
        "message": "messages",
        "presence_penality": "presence_penalty",
    }.items(),
)
def test_an_unknown_field_names_the_one_that_was_probably_meant(server: RunningServer, wrong: str, meant: str) -> None:
    error = _refusal(server, _CHAT, chat_body(**{wrong: 1}))
    assert (error["param"], error["code"]) == (wrong, "unknown_parameter")
    assert error["message"] == f"Unknown field: '{wrong}'. Did you mean '{meant}'?"


@pytest.mark.parametrize("name", ["foo", "x" * 100_000, "", "a b", "é", "line\nbreak"])
def test_a_name_like_no_other_gets_no_suggestion(server: RunningServer, name: str) -> None:
    error = _refusal(server, _CHAT, chat_body(**{name: 1}))
    assert "mean" not in error["message"]
    assert len(error["message"]) < 200


def test_a_range_is_named_whole(server: RunningServer) -> None:
    for name, value, bounds in (
        ("temperature", 2.5, "from 0 to 2"),
        ("presence_penalty", -3, "from -2 to 2"),
        ("repetition_penalty", 0, "from 0.01 to 100"),
        ("seed", 2**63, "from -9223372036854775808 to 9223372036854775807"),
    ):
        error = _refusal(server, _CHAT, chat_body(**{name: value}))
        assert (error["param"], error["code"]) == (name, "invalid_value")
        assert error["message"] == f"'{name}' must be {bounds}."


# ---------------------------------------------------------------- unknown_fields=report


@pytest.fixture(scope="module")
def reporting_server(tokenizer_dir: Path) -> Iterator[RunningServer]:
    with running_server(tokenizer_dir, unknown_fields="report") as server:
        manager = server.manager
        manager.on_submit = lambda submit: speak(manager, submit, [5, 6])
        yield server


def test_unknown_fields_are_reported_where_they_are_not_refused(reporting_server: RunningServer) -> None:
    status, headers, answer = _post(
        reporting_server, _CHAT, chat_body(foo=1, audio={}, functions=[{}], user="x", bar=None, **{"a\r\nb": 2})
    )
    assert status == 200, answer
    assert headers["x-toka-ignored"] == "user,foo,audio,functions,other"
    metrics = reporting_server.request("GET", "/metrics")[2].decode()
    assert 'toka_request_fields_ignored_total{field="other"} 4.0' in metrics


def test_reporting_changes_nothing_about_wrong_values(reporting_server: RunningServer) -> None:
    assert _refusal(reporting_server, _CHAT, chat_body(foo=1, temperature=5))["param"] == "temperature"
    assert _refusal(reporting_server, _CHAT, {"foo": 1, "model": MODEL})["param"] == "messages"


def test_a_thousand_unknown_fields_fit_into_the_header(reporting_server: RunningServer) -> None:
    fields = {f"field_{number}": number for number in range(1000)}
    status, headers, _ = _post(reporting_server, _COMPLETIONS, completion_body(**fields))
    assert status == 200
    assert len(headers["x-toka-ignored"]) < 2000


# ---------------------------------------------------------------- messages


def test_a_messages_name_and_further_keys_reach_the_template(tokenizer_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "named"
    folder.mkdir()
    for file in tokenizer_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    source = (
        "{% for m in messages %}{{ m.name }}:{{ m.reasoning_content }}:{{ m.extra.a[0] }}:{{ m.content }};{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(source)
    with running_server(folder) as server:
        server.manager.on_submit = lambda submit: speak(server.manager, submit, [5])
        message = {"role": "assistant", "content": "Hi", "name": "Bob", "reasoning": "So", "extra": {"a": ["deep"]}}
        status, headers, answer = _post(server, _CHAT, chat_body(messages=[message]))
        assert status == 200, answer
        assert "x-toka-ignored" not in headers
        ids = server.manager.submits[0].prompt_ids.tolist()
        from toka_engine.server.tokenization import Tokenizer

        tokenizer = Tokenizer(folder)
        assert b"".join(tokenizer.bytes_of[token] for token in ids) == b"Bob:So:deep:Hi;"
        # A special token in a further key stays text.
        message = {"role": "assistant", "content": "Hi", "name": "<|im_end|>", "extra": {"a": ["<|im_start|>"]}}
        _post(server, _CHAT, chat_body(messages=[message]))
        ids = server.manager.submits[1].prompt_ids.tolist()
        assert not [token for token in ids if token <= 16]
        assert b"".join(tokenizer.bytes_of[token] for token in ids) == b"<|im_end|>::<|im_start|>:Hi;"


def test_a_plain_history_of_the_sdk_is_taken_back(server: RunningServer) -> None:
    client = client_of(server)
    messages: list[Any] = [{"role": "user", "content": "Hi", "name": "Bob"}]
    answer = client.chat.completions.create(model=MODEL, messages=messages)
    messages += [answer.choices[0].message, {"role": "user", "content": "More"}]
    assert client.chat.completions.create(model=MODEL, messages=messages).choices[0].message.content == SENTENCE


def test_parts_of_other_endpoints_are_text(server: RunningServer) -> None:
    parts = [
        {"type": "input_text", "text": "One"},
        {"type": "output_text", "text": "Two", "annotations": []},
        {"type": "refusal", "refusal": "Three", "text": None},
        {"type": "text", "text": "Four", "cache_control": {"type": "ephemeral"}},
    ]
    status, headers, _ = _post(server, _CHAT, chat_body(messages=[{"role": "user", "content": parts}]))
    assert status == 200
    assert headers["x-toka-ignored"] == "messages.content.annotations,messages.content.cache_control"
    _post(server, _CHAT, chat_body(messages=[{"role": "user", "content": "One\nTwo\nThree\nFour"}]))
    first, second = server.manager.submits
    assert first.prompt_ids.tolist() == second.prompt_ids.tolist()


def test_an_unknown_field_of_the_sdk_is_an_error_of_the_sdk(server: RunningServer) -> None:
    with pytest.raises(openai.BadRequestError, match="Did you mean 'top_p'"):
        client_of(server).chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hi"}], extra_body={"topp": 1}
        )


# ---------------------------------------------------------------- priorities


def test_priorities_reach_the_manager_and_flex_is_background_work(server: RunningServer) -> None:
    cases: list[tuple[dict[str, Any], int]] = [
        ({}, 0),
        ({"priority": 7}, 7),
        ({"priority": -100}, -100),
        ({"service_tier": "flex"}, 10),
        ({"service_tier": "flex", "priority": 0}, 0),
        ({"service_tier": "default"}, 0),
    ]
    for path, body in ((_COMPLETIONS, completion_body()), (_CHAT, chat_body())):
        for fields, expected in cases:
            status, headers, answer = _post(server, path, {**body, **fields})
            assert status == 200, answer
            assert "x-toka-ignored" not in headers
            assert server.manager.submits[-1].priority == expected


@pytest.mark.parametrize("value", [-101, 101, 1.5, "1", True, [1]])
def test_a_priority_out_of_range_is_refused_by_name(server: RunningServer, value: Any) -> None:
    assert _refusal(server, _CHAT, chat_body(priority=value))["param"] == "priority"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"model": MODEL, "input": "Hello"}),
        ("/v1/messages", {"model": MODEL, "max_tokens": 9, "messages": [{"role": "user", "content": "Hello"}]}),
    ],
)
def test_the_flex_tier_is_background_work_in_every_endpoint(
    server: RunningServer, path: str, body: dict[str, Any]
) -> None:
    for tier, priority, shown in (("flex", 10, "flex"), ("default", 0, "default"), (None, 0, "default")):
        status, headers, answer = _post(server, path, {**body, "service_tier": tier})
        assert status == 200, answer
        assert "x-toka-ignored" not in headers
        assert server.manager.submits[-1].priority == priority
        if path == "/v1/responses":
            assert answer["service_tier"] == shown
    assert _post(server, path, {**body, "service_tier": "priority"})[1]["x-toka-ignored"] == "service_tier"
