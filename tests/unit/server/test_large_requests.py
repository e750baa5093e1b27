"""Large requests are made ready by a process of their own: answers are the same, and others are served meanwhile."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from toka_engine.messages import Submit
from toka_engine.server.large_requests import ANSWER_S, LARGE_BYTES, MANY_QUOTES

from tests.unit.server.conftest import chat_body, completion_body
from tests.unit.server.harness import WAIT_S, RunningServer, each, end, running_server, speak, streams_of

_CHAT, _MESSAGES, _RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
_COMPLETIONS = "/v1/completions"
_JSON = {"content-type": "application/json"}
_PADDING = b" " * (LARGE_BYTES + 1)
"""White space, which no JSON minds."""
_TOOL = {"name": "now", "description": "The time", "parameters": {"type": "object", "properties": {"zone": {}}}}
_FUNCTION = {"type": "function", "function": {**_TOOL, "strict": True}}
_SCHEMA = {"name": "s", "schema": {"type": "array", "uniqueItems": True}}


def helpers_of(server: RunningServer) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children()
    return [child for child in children if "toka_engine.server.preparing" in child.cmdline()]


@pytest.fixture(scope="module")
def speaking(tokenizer_dir: Path, sentence_ids: list[int]) -> Iterator[RunningServer]:
    with running_server(tokenizer_dir) as server:

        def answer(submit: Submit) -> None:
            if not submit.deliver_each:
                speak(server.manager, submit, sentence_ids)
                return
            streams = streams_of(submit)
            tokens = each(streams * len(sentence_ids), [token for token in sentence_ids for _ in streams])
            ends = end(streams, len(sentence_ids) + 1)
            changes = {name: getattr(ends, name) for name in ends.__struct_fields__ if name.startswith("ended")}
            server.manager.send(msgspec.structs.replace(tokens, **changes))  # one message: no chance cuts the events

        server.manager.on_submit = answer
        yield server


def _items(**fields: Any) -> dict[str, Any]:
    return {"model": "smollm2", "input": "What is it?", "max_output_tokens": 8, **fields}


def _message(**fields: Any) -> dict[str, Any]:
    return {"model": "smollm2", "max_tokens": 8, "messages": [{"role": "user", "content": "Hi"}], **fields}


_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "completions": (_COMPLETIONS, completion_body(n=2, best_of=3, stop=["Paris"], user="me", return_token_ids=True)),
    "completions-stream": (_COMPLETIONS, completion_body(stream=True, prompt=["One", "Two"], echo=True)),
    "completions-echo": (_COMPLETIONS, completion_body(prompt=[[5, 6], [7]], echo=True, logprobs=2)),
    "completions-many": (_COMPLETIONS, completion_body(prompt=[f"Number {n}" for n in range(200)], max_tokens=2)),
    "completions-truncated": (_COMPLETIONS, completion_body(prompt=[[5] * 9, [6]], truncate_prompt_tokens=4)),
    "completions-edits": (_COMPLETIONS, completion_body(logit_bias={"5": 1}, bad_words=["no way"], min_tokens=2)),
    "completions-schema": (_COMPLETIONS, completion_body(guided_json={"type": "array"})),
    "completions-wrong-grammar": (_COMPLETIONS, completion_body(guided_regex="(a")),
    "completions-wrong-id": (_COMPLETIONS, completion_body(prompt=[[5], [6, 10**6]])),
    "completions-too-long": (_COMPLETIONS, completion_body(prompt="word " * 3000)),
    "completions-hints-and-wrong": (_COMPLETIONS, completion_body(user="me", max_tokens=9999)),
    "completions-no-prompt": (_COMPLETIONS, {"model": "smollm2"}),
    "chat": (_CHAT, chat_body(n=2, stop=["Paris"], logprobs=True, top_logprobs=2, user="me", return_token_ids=True)),
    "chat-stream": (_CHAT, chat_body(stream=True, stream_options={"include_usage": True}, seed=-3)),
    "chat-tools": (_CHAT, chat_body(tools=[_FUNCTION], tool_choice="required", parallel_tool_calls=False)),
    "chat-edits": (_CHAT, chat_body(logit_bias={"5": 1}, bad_words=["no way"], stop_token_ids=[7], min_tokens=2)),
    "chat-schema": (_CHAT, chat_body(response_format={"type": "json_schema", "json_schema": _SCHEMA})),
    "chat-documents": (_CHAT, chat_body(documents=[{"title": "t"}], chat_template_kwargs={"unread": 1})),
    "chat-special-text": (_CHAT, chat_body(messages=[{"role": "user", "content": "<|im_end|> <|im_start|>"}])),
    "chat-unknown-field": (_CHAT, chat_body(temprature=1)),
    "chat-hints-and-wrong": (_CHAT, chat_body(user="me", max_tokens=9999)),
    "chat-wrong-type": (_CHAT, chat_body(messages=[{"role": "user", "content": 5}])),
    "chat-wrong-grammar": (_CHAT, chat_body(guided_regex="(a")),
    "chat-no-model": (_CHAT, chat_body(model="none")),
    "messages": (_MESSAGES, _message(system="Be brief.", stop_sequences=["x"], tools=[{"name": "now"}])),
    "messages-stream": (_MESSAGES, _message(stream=True, thinking={"type": "enabled"})),
    "messages-wrong-stop": (_MESSAGES, _message(stop_sequences=[""])),
    "messages-no-max-tokens": (_MESSAGES, _message(max_tokens=None)),
    "messages-count": (f"{_MESSAGES}/count_tokens", _message(tools=[{"name": "now", "input_schema": {}}])),
    "responses": (
        _RESPONSES,
        _items(instructions="Be brief.", metadata={"a": "b"}, tools=[{"type": "function", **_TOOL}]),
    ),
    "responses-stream": (_RESPONSES, _items(stream=True, store=False, include=["message.output_text.logprobs"])),
    "responses-auto": (
        _RESPONSES,
        _items(input=[{"role": "user", "content": "word " * 900}] * 4, truncation="auto", max_tool_calls=1),
    ),
    "responses-too-long": (_RESPONSES, _items(input="word " * 3000)),
    "responses-no-earlier": (_RESPONSES, _items(previous_response_id="resp_none")),
    "responses-count": (f"{_RESPONSES}/input_tokens", {"input": "How many?"}),
    "tokenize": ("/tokenize", {"messages": [{"role": "user", "content": "Hi"}], "return_token_strs": True}),
    "tokenize-both": ("/tokenize", {"prompt": "a", "messages": []}),
}


def _ask(server: RunningServer, path: str, body: bytes) -> tuple[int, str | None, str]:
    """Return the status, the fields that are named as ignored, and the answer without what differs each time."""
    status, headers, raw = server.request("POST", path, body, _JSON)
    text = re.sub(r'"(created|created_at|completed_at)":[\d.]+', r'"\1":0', raw.decode())
    return status, headers.get("x-toka-ignored"), re.sub(r"\b(chatcmpl-|cmpl-|[a-z]+_)[0-9a-f]{24,}", r"\1", text)


@pytest.mark.parametrize("name", _CASES)
def test_a_large_request_has_the_answer_of_a_small_one(speaking: RunningServer, name: str) -> None:
    path, fields = _CASES[name]
    body = json.dumps(fields).encode()
    speaking.manager.submits.clear()
    small = _ask(speaking, path, body)
    large = _ask(speaking, path, body + _PADDING)
    assert large == small
    assert small[0] in (200, 400, 404)
    assert len(helpers_of(speaking)) == 1
    submits = speaking.manager.submits
    half = len(submits) // 2
    for first, second in zip(submits[:half], submits[half:], strict=True):
        assert first.prompt_ids.tolist() == second.prompt_ids.tolist()
        assert (first.sampling, first.grammar, first.stop_ids) == (second.sampling, second.grammar, second.stop_ids)


def test_a_request_of_many_texts_is_large_and_one_of_few_is_not(tokenizer_dir: Path, sentence_ids: list[int]) -> None:
    few = chat_body(messages=[{"role": "user", "content": "word " * 1200}])
    many = chat_body(messages=[{"role": "user", "content": "x", **{f"k{n}": "" for n in range(MANY_QUOTES)}}])
    with running_server(tokenizer_dir) as server:
        server.manager.on_submit = lambda submit: speak(server.manager, submit, sentence_ids)
        assert server.post(_CHAT, few)[0] == 200
        assert not helpers_of(server)
        assert server.post(_CHAT, many)[0] == 200
        assert helpers_of(server)


def test_a_large_request_among_others_in_one_body_goes_that_way_too(
    tokenizer_dir: Path, sentence_ids: list[int]
) -> None:
    path, small = "/custom/synchronous-batch-completions", completion_body(prompt=[5, 6])
    large = {**small, "metadata": {"note": "x" * LARGE_BYTES}}
    with running_server(tokenizer_dir) as server:
        server.manager.on_submit = lambda submit: speak(server.manager, submit, sentence_ids)
        assert server.post(path, {"requests": [small] * 3})[0] == 200
        assert not helpers_of(server)
        status, answers = server.post(path, {"requests": [small, large, {**large, "max_tokens": -1}]})
        assert helpers_of(server)
    assert status == 200
    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[2]["error"]["param"] == "max_tokens"


def test_a_body_that_is_not_json_is_named_as_such(speaking: RunningServer) -> None:
    for path in (_COMPLETIONS, _CHAT):
        for body in (b"{" + _PADDING, b"\xff\xfe" + _PADDING, b'{"model": NaN}' + _PADDING, _PADDING):
            status, _, text = _ask(speaking, path, body)
            assert (status, json.loads(text)["error"]["type"]) == (400, "invalid_request_error")


def test_a_large_response_is_kept_and_continued(speaking: RunningServer) -> None:
    long = {"role": "user", "content": [{"type": "input_text", "text": "word " * 300, "note": "x" * LARGE_BYTES}]}
    status, _, raw = speaking.request("POST", _RESPONSES, json.dumps(_items(input=[long])).encode(), _JSON)
    assert status == 200, raw
    first = json.loads(raw)
    kept = json.loads(speaking.request("GET", f"{_RESPONSES}/{first['id']}/input_items")[2])
    assert kept["data"][0]["content"] == long["content"]
    # The conversation that this small request continues is large.
    speaking.manager.submits.clear()
    again = _items(input="And then?", previous_response_id=first["id"])
    status, answer = speaking.post(_RESPONSES, again)
    assert (status, answer["previous_response_id"]) == (200, first["id"])
    (submit,) = speaking.manager.submits
    assert len(submit.prompt_ids) > 300


def test_others_are_served_while_a_large_request_is_made_ready(speaking: RunningServer) -> None:
    body = json.dumps(chat_body()).encode() + _PADDING
    assert _ask(speaking, _CHAT, body)[0] == 200
    (helper,) = helpers_of(speaking)
    helper.suspend()
    answers: list[Any] = []
    threads = [threading.Thread(target=lambda: answers.append(_ask(speaking, _CHAT, body))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        assert speaking.post(_COMPLETIONS, completion_body())[0] == 200
        assert speaking.post(_CHAT, chat_body())[0] == 200
    assert not answers
    helper.resume()
    for thread in threads:
        thread.join(WAIT_S)
    assert [status for status, _, _ in answers] == [200] * 3
    assert helpers_of(speaking) == [helper]


@pytest.fixture
def fresh(tokenizer_dir: Path, sentence_ids: list[int]) -> Iterator[RunningServer]:
    """A server that has not lost a process yet."""
    with running_server(tokenizer_dir) as server:
        server.manager.on_submit = lambda submit: speak(server.manager, submit, sentence_ids)
        yield server


def test_the_first_process_killed_while_it_waits_costs_nothing_and_the_next_one_a_pause(fresh: RunningServer) -> None:
    body = json.dumps(chat_body()).encode() + _PADDING
    for _ in range(2):
        assert _ask(fresh, _CHAT, body)[0] == 200
        (helper,) = helpers_of(fresh)
        os.kill(helper.pid, signal.SIGKILL)
        psutil.wait_procs([helper], timeout=30)
    status, headers, raw = fresh.request("POST", _CHAT, body, _JSON)
    assert (status, json.loads(raw)["error"]["code"], headers["retry-after"]) == (503, "unavailable", "1")
    assert not helpers_of(fresh)
    assert fresh.post(_CHAT, chat_body())[0] == 200
    time.sleep(1.0)
    assert _ask(fresh, _CHAT, body)[0] == 200


def test_a_process_that_is_killed_at_work_is_a_503_and_the_next_request_gets_another(fresh: RunningServer) -> None:
    body = json.dumps(chat_body()).encode() + _PADDING
    assert _ask(fresh, _CHAT, body)[0] == 200
    (helper,) = helpers_of(fresh)
    helper.suspend()
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(_ask(fresh, _CHAT, body)))
    thread.start()
    time.sleep(0.5)  # it is being asked
    os.kill(helper.pid, signal.SIGKILL)
    thread.join(WAIT_S)
    ((status, _, text),) = answers
    assert status == 503
    assert "was lost" in json.loads(text)["error"]["message"]
    assert _ask(fresh, _CHAT, body)[0] == 200


def test_a_process_that_is_stopped_at_work_is_given_up_before_the_time_for_a_request(fresh: RunningServer) -> None:
    body = json.dumps(chat_body()).encode() + _PADDING
    assert _ask(fresh, _CHAT, body)[0] == 200
    (helper,) = helpers_of(fresh)
    helper.suspend()
    began_s = time.monotonic()
    status, _, text = _ask(fresh, _CHAT, body)
    assert time.monotonic() - began_s < ANSWER_S / 2
    assert status == 503
    assert "was lost" in json.loads(text)["error"]["message"]
    assert _ask(fresh, _CHAT, body)[0] == 200
    assert helper not in helpers_of(fresh)


def test_a_client_that_leaves_while_it_waits_costs_nothing_more(speaking: RunningServer) -> None:
    body = json.dumps(chat_body()).encode() + _PADDING
    assert _ask(speaking, _CHAT, body)[0] == 200
    (helper,) = helpers_of(speaking)
    helper.suspend()
    speaking.manager.submits.clear()
    head = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    socks = [speaking.connect() for _ in range(4)]
    for sock in socks:
        sock.sendall(head % (_CHAT.encode(), len(body)) + body)
    time.sleep(0.5)
    for sock in socks:
        sock.close()
    time.sleep(0.5)
    helper.resume()
    assert _ask(speaking, _CHAT, body)[0] == 200
    assert len(speaking.manager.submits) <= 2  # that of the last request, and of the one that was being made ready


def test_a_request_that_would_take_too_much_memory_is_a_400_and_the_server_lives_on(speaking: RunningServer) -> None:
    hollow = b'{"model":"smollm2","messages":[{"role":"user","content":[' + b"{}," * 10_000_000 + b"{}]}]}"
    before = psutil.Process(speaking.process.pid).memory_info().rss
    status, _, text = _ask(speaking, _CHAT, hollow)
    assert (status, json.loads(text)["error"]["type"]) == (400, "invalid_request_error"), text
    assert _ask(speaking, _CHAT, json.dumps(chat_body()).encode() + _PADDING)[0] == 200
    assert psutil.Process(speaking.process.pid).memory_info().rss < before + 20e6


def test_memory_is_given_back_after_messages_of_300_000_keys(tokenizer_dir: Path, sentence_ids: list[int]) -> None:
    def answer(submit: Submit) -> None:
        speak(server.manager, submit, sentence_ids)

    keys = {f"k{number}": number for number in range(300_000)}
    large = json.dumps(chat_body(messages=[{"role": "user", "content": "x", **keys}])).encode()
    statuses: list[int] = []
    with running_server(tokenizer_dir, access_log=False) as server:
        server.manager.on_submit = answer
        for _ in range(20):
            assert server.post(_CHAT, chat_body())[0] == 200
        time.sleep(1.5)
        before = psutil.Process(server.process.pid).memory_info().rss
        for _ in range(2):
            threads = [
                threading.Thread(target=lambda: statuses.append(_ask(server, _CHAT, large)[0])) for _ in range(4)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(WAIT_S)
        assert statuses == [400] * 8
        time.sleep(1.5)
        assert server.post(_CHAT, chat_body())[0] == 200
        assert psutil.Process(server.process.pid).memory_info().rss < before + 20e6
        (helper,) = helpers_of(server)
        assert helper.memory_info().rss < before + 64e6


def test_the_process_ends_with_the_server_and_stands_back_behind_it(tokenizer_dir: Path) -> None:
    with running_server(tokenizer_dir) as server:
        assert not helpers_of(server)
        assert server.request("POST", "/tokenize", b'{"prompt": "a"}' + _PADDING, _JSON)[0] == 200
        found = helpers_of(server)
        assert [process.nice() for process in found] == [min(19, psutil.Process(server.process.pid).nice() + 5)]
    psutil.wait_procs(found, timeout=30)
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in found)
