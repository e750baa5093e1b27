"""A client that goes away frees what it held: blocks and streams, at every point, alone or many."""

from __future__ import annotations

import http.client
import json
import threading

import openai
import pytest

from tests.api.conftest import read_metrics
from tests.engine_process import EngineProcess


def wait_idle(engine: EngineProcess) -> None:
    """Wait until the engine holds nothing. Metrics come a few times a second, so they are asked again."""
    pause = threading.Event()
    for _ in range(600):
        metrics = read_metrics(engine)
        held = [metrics[f"toka_{name}"] for name in ("running", "waiting", "kv_pages_used", "requests_running")]
        if not any(held):
            return
        pause.wait(0.1)
    raise AssertionError(f"still held: {held}")


def start(engine: EngineProcess, **fields: object) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", engine.port, timeout=120)
    body = {"model": "m", "prompt": "Once upon a time", "max_tokens": 2000, "ignore_eos": True, **fields}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection


@pytest.mark.parametrize("n", [1, 8])
def test_a_stream_left_in_the_middle_frees_its_blocks(engine: EngineProcess, client: openai.OpenAI, n: int) -> None:
    before = read_metrics(engine)["toka_output_tokens_total"]
    stream = client.completions.create(
        model="m", prompt="Once", max_tokens=2000, n=n, stream=True, extra_body={"ignore_eos": True}
    )
    for _ in range(5):
        next(iter(stream))
    stream.close()
    wait_idle(engine)
    assert read_metrics(engine)["toka_output_tokens_total"] - before < 2000 * n


@pytest.mark.parametrize("n", [1, 8])
def test_a_client_that_leaves_before_its_answer_frees_its_blocks(engine: EngineProcess, n: int) -> None:
    before = read_metrics(engine)["toka_output_tokens_total"]
    start(engine, n=n).close()
    wait_idle(engine)
    assert read_metrics(engine)["toka_output_tokens_total"] - before < 2000 * n


def test_a_client_that_leaves_in_the_queue_is_forgotten(engine: EngineProcess) -> None:
    crowd = [start(engine, n=64, max_tokens=200) for _ in range(4)]
    for connection in crowd:
        connection.close()
    wait_idle(engine)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_whose_time_is_over_frees_its_blocks(engine: EngineProcess, stream: bool) -> None:
    before = read_metrics(engine)["toka_output_tokens_total"]
    connection = start(engine, n=4, stream=stream, timeout_s=1.5)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    assert answer.status in ((200, 504) if stream else (504,))  # 504, too, where no token came in time
    assert json.loads(text.strip().rpartition("data: ")[2])["error"]["code"] == "deadline_exceeded"
    wait_idle(engine)
    assert read_metrics(engine)["toka_output_tokens_total"] - before < 2000 * 4


def test_many_that_leave_and_one_that_stays(engine: EngineProcess, client: openai.OpenAI) -> None:
    alone = client.completions.create(model="m", prompt="The sky is", max_tokens=20, temperature=0)
    leavers = [start(engine, stream=bool(i % 2), n=1 + i % 3, max_tokens=500) for i in range(12)]
    stays = start(engine, prompt="The sky is", max_tokens=20, temperature=0, ignore_eos=False)
    for connection in leavers:
        connection.close()
    answer = json.load(stays.getresponse())
    stays.close()
    assert answer["choices"][0]["text"] == alone.choices[0].text
    wait_idle(engine)
