"""Server-sent events: their exact shape, their text, and what ends them."""

from __future__ import annotations

import json
import re
from typing import Any

import openai
import pytest
from toka_engine.messages import FINISH_ERROR, FINISH_LENGTH, Submit
from toka_engine.server.tokenization import Tokenizer

from tests.unit.server.conftest import SENTENCE, chat_body, completion_body
from tests.unit.server.harness import MODEL, RunningServer, each, end, streams_of

_HEADERS = {"content-type": "application/json"}


def _events(server: RunningServer, path: str, body: dict[str, object]) -> list[str]:
    """The events of one answer as text, with its id, time and fingerprint made constant."""
    raw = json.dumps({**body, "stream": True}).encode()
    status, headers, answer = server.request("POST", path, raw, _HEADERS)
    assert status == 200
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    text = re.sub(r'"created":\d+', '"created":0', re.sub(r'"id":"(\w+)-[0-9a-f]{24}"', r'"id":"\1"', answer.decode()))
    text = re.sub(r'"system_fingerprint":"fp_[0-9a-f]{12}"', '"system_fingerprint":"fp"', text)
    assert text.endswith("\n\n")
    return [event.removeprefix("data: ") for event in text.split("\n\n")[:-1]]


def _one_by_one(server: RunningServer, ids: list[int], reason: int = FINISH_LENGTH) -> None:
    """Answer with one message per token, and one for the end."""
    server.manager.on_submit = lambda submit: server.manager.send(
        *(each(streams_of(submit), [token] * submit.num_choices) for token in ids),
        end(streams_of(submit), len(ids), reason),
    )


def test_a_streamed_completion_has_these_events(server: RunningServer, sentence_ids: list[int]) -> None:
    _one_by_one(server, sentence_ids[:1])
    head = '{"id":"cmpl","object":"text_completion","created":0,"model":"smollm2","system_fingerprint":"fp","choices":['
    events = _events(server, "/v1/completions", completion_body())
    text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
    assert text == "The"
    assert events[-2].startswith(head + '{"index":0,"text":')
    assert events[-2].endswith('"logprobs":null,"finish_reason":"length"}]}')
    assert events[-1] == "[DONE]"


def test_a_streamed_chat_has_these_events(server: RunningServer, sentence_ids: list[int]) -> None:
    def answer_at_once(submit: Submit) -> None:
        delta, ending = each(streams_of(submit), sentence_ids[:1]), end(streams_of(submit), 1, FINISH_LENGTH)
        server.manager.send(
            type(delta)(
                streams=delta.streams,
                tokens=delta.tokens,
                ended=ending.ended,
                ended_reasons=ending.ended_reasons,
                ended_num_tokens=ending.ended_num_tokens,
                ended_lengths=ending.ended_lengths,
            )
        )

    server.manager.on_submit = answer_at_once
    no_usage = ',"usage":null}'
    head = '{"id":"chatcmpl","object":"chat.completion.chunk","created":0,"model":"smollm2",'
    head += '"system_fingerprint":"fp","choices":['
    assert _events(server, "/v1/chat/completions", chat_body(stream_options={"include_usage": True})) == [
        head + '{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]' + no_usage,
        head + '{"index":0,"delta":{"content":"The"},"logprobs":null,"finish_reason":null}],"usage":null}',
        head + '{"index":0,"delta":{},"logprobs":null,"finish_reason":"length"}],"usage":null}',
        head + '],"usage":{"prompt_tokens":31,"completion_tokens":1,"total_tokens":32,'
        '"prompt_tokens_details":{"cached_tokens":0}}}',
        "[DONE]",
    ]


def test_usage_comes_only_where_it_is_asked_for(server: RunningServer) -> None:
    plain = _events(server, "/v1/completions", completion_body())
    assert not any("usage" in event for event in plain)
    asked = _events(server, "/v1/completions", completion_body(stream_options={"include_usage": True}))
    assert [json.loads(event)["usage"] is None for event in asked[:-1]] == [True] * (len(asked) - 2) + [False]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_streamed_text_never_splits_a_character(server: RunningServer, tokenizer: Tokenizer, path: str) -> None:
    text = "a \U0001f9d1\u200d\U0001f680 déjà 漢字 \U0001f600"
    ids = tokenizer.encode([text], add_special_tokens=False)[0].tolist()
    assert any(tokenizer.bytes_of[token].decode("utf-8", "ignore") == "" for token in ids), "no token splits one"
    _one_by_one(server, ids)
    body = completion_body() if path == "/v1/completions" else chat_body()
    pieces = []
    for event in _events(server, path, body)[:-1]:
        choice = json.loads(event)["choices"][0]
        pieces.append(choice.get("text") or choice.get("delta", {}).get("content") or "")
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_the_sdk_reads_a_stream_of_several_choices(client: openai.OpenAI) -> None:
    chunks = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Hi"}], n=3, stream=True, max_tokens=64
    )
    texts, reasons = ["", "", ""], ["", "", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] += choice.finish_reason or ""
    assert texts == [SENTENCE] * 3
    assert reasons == ["stop"] * 3


async def test_the_async_sdk_reads_a_stream(server: RunningServer) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        chunks = await client.completions.create(model=MODEL, prompt="Hi", max_tokens=64, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in chunks]) == SENTENCE


@pytest.mark.parametrize("stop", ["Paris", "ris. ", " \U0001f600", "capital of France is Paris", "e"])
def test_no_part_of_a_stop_string_is_ever_shown(server: RunningServer, client: openai.OpenAI, stop: str) -> None:
    chunks = client.completions.create(model=MODEL, prompt="Hi", max_tokens=64, stream=True, stop=stop)
    assert "".join(chunk.choices[0].text for chunk in chunks) == SENTENCE[: SENTENCE.index(stop)]


def test_text_held_for_a_stop_string_comes_when_it_does_not(client: openai.OpenAI) -> None:
    chunks = client.completions.create(model=MODEL, prompt="Hi", max_tokens=64, stream=True, stop="déjà vu!")
    assert "".join(chunk.choices[0].text for chunk in chunks) == SENTENCE


@pytest.mark.parametrize("names_ids", [False, True])
def test_streamed_chat_logprobs_cover_every_token_once(
    server: RunningServer, sentence_ids: list[int], names_ids: bool
) -> None:
    import numpy as np
    from toka_engine.messages import Deltas

    def with_logprobs(submit: Submit) -> None:
        for token in sentence_ids:
            server.manager.send(
                Deltas(
                    streams=np.array([submit.first_stream], np.int64),
                    tokens=np.array([token], np.int32),
                    logprobs=np.array([-0.5], np.float32),
                    top_rows=np.array([0], np.int32),
                    top_tokens=np.array([token], np.int32),
                    top_logprobs=np.array([-0.5], np.float32),
                    top_width=1,
                )
            )
        server.manager.send(end([submit.first_stream], len(sentence_ids)))

    server.manager.on_submit = with_logprobs
    content: list[dict[str, Any]] = []
    text = ""
    body = chat_body(logprobs=True, top_logprobs=1, return_tokens_as_token_ids=names_ids)
    for event in _events(server, "/v1/chat/completions", body)[:-1]:
        choice = json.loads(event)["choices"][0]
        text += choice["delta"].get("content", "")
        content += (choice["logprobs"] or {}).get("content", [])
    assert text == SENTENCE
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == SENTENCE
    assert all(entry["logprob"] == -0.5 and len(entry["top_logprobs"]) == 1 for entry in content)
    if names_ids:
        assert [entry["token"] for entry in content] == [f"token_id:{token}" for token in sentence_ids]


def test_an_error_inside_a_stream_is_its_last_event(server: RunningServer, sentence_ids: list[int]) -> None:
    server.manager.on_submit = lambda submit: server.manager.send(each([submit.first_stream], sentence_ids[:1]))
    body = json.dumps(completion_body(stream=True)).encode()
    with server.connect() as sock:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        sock.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        answer = b""
        while b"The" not in answer:
            answer += sock.recv(65536)
        server.manager.send(end([server.manager.submits[0].first_stream], 1, FINISH_ERROR))
        while data := sock.recv(65536):
            answer += data
    assert b'data: {"error":{"message":"The model produced non-finite values' in answer
    assert b"[DONE]" not in answer


def test_tokens_that_come_together_with_the_error_are_delivered_before_it(
    server: RunningServer, sentence_ids: list[int]
) -> None:
    def answer(submit: Submit) -> None:
        tokens = [each([submit.first_stream], [token]) for token in sentence_ids[:3]]
        server.manager.send(*tokens, end([submit.first_stream], 3, FINISH_ERROR))

    server.manager.on_submit = answer
    body = json.dumps(completion_body(stream=True)).encode()
    status, _, raw = server.request("POST", "/v1/completions", body, _HEADERS)
    assert status == 200
    *events, last = [json.loads(line.removeprefix(b"data: ")) for line in raw.split(b"\n\n") if line]
    assert "".join(event["choices"][0]["text"] for event in events) == "The capital of"
    assert last["error"]["code"] == "not_finite"
