"""Tokens that the manager had on their way for a choice when its stop string was seen are dropped."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import openai
import pytest
from toka_engine.messages import FINISH_LENGTH, Deltas, Submit
from toka_engine.server.tokenization import Tokenizer

from tests.unit.server.conftest import completion_body
from tests.unit.server.harness import RunningServer, each, end, streams_of


def with_logprobs(delta: Deltas) -> Deltas:
    return Deltas(streams=delta.streams, tokens=delta.tokens, logprobs=np.full(delta.tokens.size, -1, np.float32))


@pytest.fixture(params=[False, True], ids=["plain", "logprobs"])
def body(request: pytest.FixtureRequest) -> dict[str, Any]:
    return completion_body(n=2, stop="STOP", max_tokens=64) | ({"logprobs": 0} if request.param else {})


@pytest.fixture
def has_seen_other() -> threading.Event:
    """The client has read something of the other choice."""
    return threading.Event()


@pytest.fixture
def late_server(
    server: RunningServer, tokenizer: Tokenizer, body: dict[str, Any], has_seen_other: threading.Event
) -> RunningServer:
    """Answers with one choice that meets its stop string, late tokens and an end of it, then the other choice."""
    cut, late, whole = (
        ids.tolist() for ids in tokenizer.encode(["a b STOP", " c d e f", "a b c d e f"], add_special_tokens=False)
    )
    manager = server.manager

    def send(stream: int, tokens: list[int]) -> None:
        for token in tokens:
            delta = each([stream], [token])
            manager.send(with_logprobs(delta) if "logprobs" in body else delta)

    def go_on(one: int, other: int) -> None:
        manager.wait_for(lambda: one in manager.cancelled)
        send(one, late)
        manager.send(end([one], len(cut) + len(late), FINISH_LENGTH))
        send(other, whole[:2])
        assert has_seen_other.wait(20)
        send(other, whole[2:])
        manager.send(end([other], len(whole), FINISH_LENGTH))

    def answer(submit: Submit) -> None:
        one, other = streams_of(submit)
        send(one, cut)
        threading.Thread(target=go_on, args=(one, other), daemon=True).start()

    manager.on_submit = answer
    return server


def test_a_choice_stays_as_it_was_cut_and_the_others_go_on(
    late_server: RunningServer, tokenizer: Tokenizer, body: dict[str, Any], has_seen_other: threading.Event
) -> None:
    has_seen_other.set()
    status, answer = late_server.post("/v1/completions", body)
    assert status == 200
    assert [choice["text"] for choice in answer["choices"]] == ["a b ", "a b c d e f"]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop", "length"]
    cut, whole = tokenizer.encode(["a b STOP", "a b c d e f"], add_special_tokens=False)
    assert answer["usage"]["completion_tokens"] == len(cut) + len(whole)


def test_a_late_end_of_a_cut_choice_does_not_end_the_stream_of_the_others(
    late_server: RunningServer, client: openai.OpenAI, body: dict[str, Any], has_seen_other: threading.Event
) -> None:
    texts = ["", ""]
    reasons: list[Any] = [None, None]
    for chunk in client.completions.create(**{**body, "stream": True}):
        for choice in chunk.choices:
            assert reasons[choice.index] is None
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
        if texts[1]:
            has_seen_other.set()
    assert texts == ["a b ", "a b c d e f"]
    assert reasons == ["stop", "length"]
