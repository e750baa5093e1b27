"""Top logprobs beside a sampled token that is not among them: both endpoints as OpenAI's API has it."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import openai
import pytest
from toka_engine.messages import FINISH_LENGTH, Deltas, Submit

from tests.unit.server.conftest import chat_body, completion_body
from tests.unit.server.harness import MODEL, RunningServer, end

SAMPLED = -7.5


@pytest.fixture
def unlikely(server: RunningServer, sentence_ids: list[int]) -> RunningServer:
    """A server whose every answer is one unlikely token; the two likeliest others come with it."""
    sampled, *others = sentence_ids[:3]

    def answer(submit: Submit) -> None:
        stream = submit.first_stream
        tops = {
            "top_rows": np.zeros(1, np.int32),
            "top_tokens": np.array(others, np.int32),
            "top_logprobs": np.array([-0.5, -1.5], np.float32),
            "top_width": 2,
        }
        logprobs = np.array([SAMPLED], np.float32)
        if submit.deliver_each:
            one = Deltas(
                streams=np.array([stream], np.int64), tokens=np.array([sampled], np.int32), logprobs=logprobs, **tops
            )
            server.manager.send(one, end([stream], 1, FINISH_LENGTH))
            return
        server.manager.send(
            Deltas(
                ended=np.array([stream], np.int64),
                ended_reasons=np.array([FINISH_LENGTH], np.uint8),
                ended_num_tokens=np.ones(1, np.int32),
                ended_lengths=np.ones(1, np.int32),
                ended_tokens=np.array([sampled], np.int32),
                ended_logprobs=logprobs,
                top_of_ended=True,
                **tops,
            )
        )

    server.manager.on_submit = answer
    return server


def read_events(server: RunningServer, path: str, body: dict[str, object]) -> list[dict[str, object]]:
    payload = json.dumps({**body, "stream": True}).encode()
    _, _, answer = server.request("POST", path, payload, {"content-type": "application/json"})
    events = [line.removeprefix("data: ") for line in answer.decode().splitlines() if line.startswith("data: {")]
    return [choice for event in events for choice in json.loads(event)["choices"]]


def whole_choice(server: RunningServer, path: str, body: dict[str, object]) -> list[dict[str, object]]:
    status, answer = server.post(path, body)
    assert status == 200, answer
    return list(answer["choices"])


Ask = Callable[[RunningServer, str, dict[str, object]], list[dict[str, object]]]


@pytest.mark.parametrize("ask", [whole_choice, read_events])
def test_completions_list_the_sampled_token_behind_the_likeliest(unlikely: RunningServer, ask: Ask) -> None:
    choices = ask(unlikely, "/v1/completions", completion_body(logprobs=2))
    (tops,) = [tops for choice in choices for tops in (choice["logprobs"] or {}).get("top_logprobs") or []]
    assert list(tops.items()) == [(" capital", -0.5), (" of", -1.5), ("The", SAMPLED)]


@pytest.mark.parametrize("ask", [whole_choice, read_events])
def test_chat_lists_the_likeliest_alone_and_the_sampled_token_beside_them(unlikely: RunningServer, ask: Ask) -> None:
    choices = ask(unlikely, "/v1/chat/completions", chat_body(logprobs=True, top_logprobs=2, max_tokens=1))
    (entry,) = [entry for choice in choices for entry in (choice["logprobs"] or {}).get("content") or []]
    assert (entry["token"], entry["logprob"]) == ("The", SAMPLED)
    assert [(top["token"], top["logprob"]) for top in entry["top_logprobs"]] == [(" capital", -0.5), (" of", -1.5)]


def test_without_tops_the_sampled_tokens_logprob_stands_alone(unlikely: RunningServer, client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Hello", max_tokens=1, logprobs=0)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert (logprobs.token_logprobs, logprobs.top_logprobs) == ([SAMPLED], None)
