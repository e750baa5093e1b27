"""Usage whole and in every event, with cached tokens as the manager counts them; token ids; fingerprints."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.unit.server.conftest import chat_body, client_of, completion_body
from tests.unit.server.harness import MODEL, RunningServer, each, end, speak, start, streams_of

_PATHS = ("/v1/completions", "/v1/chat/completions")


def _body(path: str, **fields: Any) -> dict[str, Any]:
    return completion_body(**fields) if path == _PATHS[0] else chat_body(**fields)


def _chunks(server: RunningServer, path: str, **fields: Any) -> list[Any]:
    raw = json.dumps(_body(path, stream=True, **fields)).encode()
    status, _, answer = server.request("POST", path, raw, {"content-type": "application/json"})
    assert status == 200, answer
    events = [event.removeprefix("data: ") for event in answer.decode().split("\n\n")[:-1]]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


@pytest.mark.parametrize("path", _PATHS)
def test_usage_counts_the_tokens_that_were_cached(server: RunningServer, path: str) -> None:
    def answer(submit: Any) -> None:
        server.manager.send(start(submit, 1), start(submit, 0))  # the second time after a preemption
        speak(server.manager, submit, [5, 6])

    server.manager.on_submit = answer
    _, whole = server.post(path, _body(path, n=3))
    assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
    last = _chunks(server, path, stream_options={"include_usage": True})[-1]
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}


def test_cached_tokens_of_several_prompts_add_up(server: RunningServer) -> None:
    def answer(submit: Any) -> None:
        server.manager.send(start(submit, len(submit.prompt_ids) - 1))
        speak(server.manager, submit, [5, 6])

    server.manager.on_submit = answer
    _, whole = server.post(_PATHS[0], completion_body(prompt=[[5, 6, 7], [8, 9]], n=2))
    assert whole["usage"]["prompt_tokens"] == 5
    assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


@pytest.mark.parametrize("path", _PATHS)
def test_each_event_has_the_usage_so_far_where_that_is_asked_for(server: RunningServer, path: str) -> None:
    server.manager.on_submit = lambda submit: server.manager.send(
        *(each(streams_of(submit), [token]) for token in (504, 3575, 282)), end(streams_of(submit), 4)
    )
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = _chunks(server, path, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == counts[-2] == 4
    assert chunks[-1]["choices"] == []
    assert all(chunk["usage"]["prompt_tokens"] == chunks[-1]["usage"]["prompt_tokens"] for chunk in chunks)
    alone = _chunks(server, path, stream_options={"continuous_usage_stats": True})
    assert alone[-1]["choices"]
    assert all(chunk["usage"]["completion_tokens"] <= 4 for chunk in alone)


def test_the_usage_of_events_is_that_of_their_choice(server: RunningServer) -> None:
    def answer(submit: Any) -> None:
        first, second = streams_of(submit)
        server.manager.send(each([first], [504]), each([first, second], [3575, 504]), end([first], 2), end([second], 1))

    server.manager.on_submit = answer
    chunks = _chunks(server, _PATHS[0], n=2, stream_options={"continuous_usage_stats": True})
    last = {chunk["choices"][0]["index"]: chunk["usage"]["completion_tokens"] for chunk in chunks}
    assert last == {0: 2, 1: 1}


def test_text_like_the_end_of_an_event_stays_text(server: RunningServer) -> None:
    odd = '],"usage":null}\n\n'
    chunks = _chunks(server, _PATHS[0], prompt=odd, echo=True, stream_options={"continuous_usage_stats": True})
    assert chunks[0]["choices"][0]["text"].startswith(odd)


def test_answers_have_the_fingerprint_of_the_engine(server: RunningServer) -> None:
    client = client_of(server)
    messages: Any = [{"role": "user", "content": "Hi"}]
    found = {client.completions.create(model=MODEL, prompt="Hi").system_fingerprint}
    found |= {client.chat.completions.create(model=MODEL, messages=messages).system_fingerprint}
    found |= {
        chunk.system_fingerprint
        for chunk in client.chat.completions.create(model=MODEL, messages=messages, stream=True)
    }
    assert len(found) == 1
    assert str(found.pop()).startswith("fp_")


# ---------------------------------------------------------------- token ids


@pytest.mark.parametrize("fields", [{}, {"stop": ["never"]}, {"n": 2}])
def test_an_answer_has_the_token_ids_of_prompt_and_choices(
    server: RunningServer, sentence_ids: list[int], fields: dict[str, Any]
) -> None:
    _, answer = server.post(_PATHS[0], completion_body(prompt=[[5, 6], [7]], return_token_ids=True, **fields))
    n = fields.get("n", 1)
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [[5, 6]] * n + [[7]] * n
    assert [choice["token_ids"] for choice in answer["choices"]] == [sentence_ids] * 2 * n
    assert answer["choices"][0]["logprobs"] is None
    _, chat = server.post(_PATHS[1], chat_body(return_token_ids=True, **fields))
    assert chat["prompt_token_ids"] == server.manager.submits[-1].prompt_ids.tolist()
    assert chat["choices"][0]["token_ids"] == sentence_ids


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("path", _PATHS)
def test_a_stream_has_the_token_ids_piece_by_piece(
    server: RunningServer, sentence_ids: list[int], path: str, logprobs: bool
) -> None:
    fields: dict[str, Any] = {"logprobs": True if path == _PATHS[1] else 0} if logprobs else {}
    chunks = _chunks(server, path, return_token_ids=True, **fields)
    prompt = [
        part["prompt_token_ids"]
        for chunk in chunks
        for part in (chunk, *chunk["choices"])
        if "prompt_token_ids" in part
    ]
    assert prompt == [server.manager.submits[0].prompt_ids.tolist()]
    ids = [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", [])]
    assert ids == sentence_ids
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_token_ids_come_only_where_they_are_asked_for(server: RunningServer) -> None:
    for path in _PATHS:
        _, answer = server.post(path, _body(path))
        assert "token_ids" not in json.dumps(answer)


# ---------------------------------------------------------------- retries


def test_a_failure_that_would_come_again_is_not_tried_again(server: RunningServer) -> None:
    from toka_engine.messages import FINISH_ERROR

    server.manager.on_submit = lambda submit: server.manager.send(end(streams_of(submit), 0, FINISH_ERROR))
    client = client_of(server).with_options(max_retries=2)
    with pytest.raises(openai.InternalServerError, match="non-finite"):
        client.completions.create(model=MODEL, prompt="Hi")
    assert len(server.manager.submits) == 1
