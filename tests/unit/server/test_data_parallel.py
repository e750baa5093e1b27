"""One server in front of two managers: who gets a request, what a client sees of it, and what a loss costs."""

from __future__ import annotations

import http.client
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toka_engine.control_messages import (
    ChildReady,
    Drain,
    Drained,
    Failing,
    Progress,
    RankInfo,
    RankReport,
    RankReports,
    ReplicaLost,
)
from toka_engine.messages import FINISH_LENGTH, Refused, Started, Stats, Submit

from tests.unit.server.conftest import SENTENCE, completion_body
from tests.unit.server.harness import (
    INFO,
    RunningServer,
    ScriptedManager,
    each,
    running_server,
    speak,
    streams_of,
    whole,
)

PREFIX = list(range(1000, 1500))
STATS = Stats(*[3] * 15)


@pytest.fixture
def server(pair: RunningServer, sentence_ids: list[int]) -> RunningServer:
    """Both managers answer at once, and tell what they had cached: nothing."""
    for manager in pair.managers:
        manager.forget()
        answer_at_once(manager, sentence_ids)
    return pair


def answer_at_once(manager: ScriptedManager, ids: list[int]) -> None:
    def answer(submit: Submit) -> None:
        manager.send(Started(np.array([submit.first_stream], np.int64), np.zeros(1, np.int32)))
        speak(manager, submit, ids)

    manager.on_submit = answer


def read_metrics(server: RunningServer) -> dict[str, float]:
    text = server.request("GET", "/metrics")[2].decode()
    return {name: float(value) for name, value in re.findall(r"^([^# ]+) (\S+)$", text, re.MULTILINE)}


def counts(server: RunningServer) -> list[int]:
    return [len(manager.submits) for manager in server.managers]


def ask(server: RunningServer, **changes: Any) -> tuple[int, Any]:
    return server.post("/v1/completions", completion_body(**changes))


def test_requests_are_spread_and_answered_by_either(server: RunningServer) -> None:
    answers = [ask(server, max_tokens=64) for _ in range(6)]
    assert {(status, answer["choices"][0]["text"]) for status, answer in answers} == {(200, SENTENCE)}
    assert counts(server) == [3, 3]
    streams = [submit.first_stream for manager in server.managers for submit in manager.submits]
    assert len(set(streams)) == 6


def test_a_prompt_follows_its_prefix(server: RunningServer) -> None:
    for group in range(2):
        for tail in range(5):
            assert ask(server, prompt=[*(token + group for token in PREFIX), tail])[0] == 200
            ask(server)  # something else in between
    homes = [
        {submit.prompt_ids[0] for submit in manager.submits if submit.prompt_ids.size > 100}
        for manager in server.managers
    ]
    assert homes[0].isdisjoint(homes[1])
    assert homes[0] | homes[1] == {1000, 1001}


def test_what_one_replica_refuses_another_answers(server: RunningServer) -> None:
    before = read_metrics(server)
    for manager in server.managers:
        refuse(manager)
    status, answer = ask(server)
    assert (status, answer["error"]["code"]) == (429, "queue_full")
    assert counts(server) == [1, 1]
    answer_at_once(server.managers[1], [5])
    for _ in range(4):
        assert ask(server)[0] == 200
    retries = read_metrics(server)["toka_router_retries_total"] - before["toka_router_retries_total"]
    assert retries == 1 + len(server.managers[0].submits) - 1


def refuse(manager: ScriptedManager) -> None:
    manager.on_submit = lambda submit: manager.send(Refused(submit.first_stream, "the queue is full"))


def test_many_choices_are_shared_by_idle_replicas_and_come_back_in_order(server: RunningServer) -> None:
    def answer(manager: ScriptedManager) -> None:
        def reply(submit: Submit) -> None:
            numbers = range(submit.first_choice, submit.first_choice + submit.num_choices)
            for stream, number in zip(streams_of(submit), numbers, strict=True):
                manager.send(whole(stream, [1000 + number], FINISH_LENGTH))

        manager.on_submit = reply

    for manager in server.managers:
        answer(manager)
    status, body = ask(server, n=200, max_tokens=1, seed=7)
    assert status == 200
    assert [submit.first_choice for manager in server.managers for submit in manager.submits] in ([0, 100], [100, 0])
    texts = [choice["text"] for choice in body["choices"]]
    server.managers[0].submits.clear()
    expected = [ask(server, prompt=[1], n=1, max_tokens=1)[1]["choices"][0]["text"]]
    assert texts[0] == expected[0]
    assert len(set(texts)) == 200
    assert [choice["index"] for choice in body["choices"]] == list(range(200))


def test_metrics_are_sums_and_state_each_replica(server: RunningServer) -> None:
    for manager in server.managers:
        manager.send(STATS)
    ask(server)
    ask(server)  # both links have been read by now
    metrics = read_metrics(server)
    assert metrics["toka_kv_tokens"] == 2 * INFO.num_kv_tokens
    assert metrics["toka_max_request_tokens"] == INFO.max_request_tokens
    assert (metrics["toka_running"], metrics['toka_replica_running{replica="1"}']) == (6, 3)
    assert (metrics["toka_steps_total"], metrics['toka_replica_steps_total{replica="0"}']) == (6, 3)
    assert metrics["toka_replicas"] == 2
    assert metrics['toka_replica_outstanding_tokens{replica="0"}'] == 0
    assert metrics['toka_replica_outstanding_tokens{replica="1"}'] == 0


def send_one(manager: ScriptedManager, ids: list[int]) -> None:
    manager.on_submit = lambda submit: manager.send(each(streams_of(submit), ids[:1]))


def open_streams(server: RunningServer, ids: list[int]) -> list[Any]:
    """A streamed request in each replica, whose first token has arrived, in the order of the replicas."""
    connections: list[Any] = [None, None]
    for manager in server.managers:
        send_one(manager, ids)
    for _ in range(2):
        before = counts(server)
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        body = json.dumps(completion_body(stream=True, max_tokens=100))
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        response = connection.getresponse()
        assert response.readline().startswith(b"data: ")
        (index,) = [number for number in range(2) if counts(server)[number] > before[number]]
        connections[index] = response
    return connections


def test_a_lost_replica_costs_its_requests_alone(tokenizer_dir: Path, sentence_ids: list[int]) -> None:
    with running_server(tokenizer_dir, dp_size=2, dp_min_size=1) as server:
        lost, kept = open_streams(server, sentence_ids)
        server.managers[1].send(STATS)
        server.managers[0].send(STATS)
        server.managers[0].close()
        assert b'"code":"unavailable"' in lost.read()
        server.control.send(ReplicaLost(0, "model_dp0 was ended by SIGKILL"))
        answer_at_once(server.managers[1], sentence_ids)
        assert all(ask(server)[0] == 200 for _ in range(4))
        assert server.request("GET", "/readyz")[0] == 200
        metrics = read_metrics(server)
        assert metrics["toka_replicas"] == 1
        assert (metrics["toka_running"], metrics["toka_steps_total"]) == (3, 6), "a counter never falls"
        (first, *_) = server.managers[1].submits
        server.managers[1].send(whole(first.first_stream, [], FINISH_LENGTH))
        assert b"[DONE]" in kept.read()


def test_a_request_that_waits_in_a_lost_replica_gets_503_with_retry_after(tokenizer_dir: Path) -> None:
    with running_server(tokenizer_dir, dp_size=2, dp_min_size=1) as server, ThreadPoolExecutor() as pool:
        waiting = pool.submit(
            server.request,
            "POST",
            "/v1/completions",
            b'{"model": "smollm2", "prompt": "a"}',
            {"content-type": "application/json"},
        )
        server.managers[0].wait_for(lambda: bool(server.managers[0].submits))
        server.control.send(ReplicaLost(0, "model_dp0 was ended by SIGKILL"))
        status, headers, body = waiting.result(60)
        assert (status, headers["retry-after"]) == (503, "1")
        assert b"model_dp0 was ended by SIGKILL" in body
        server.managers[0].close()
        assert all(server.request("GET", "/readyz")[0] == 200 for _ in range(5))


def test_without_a_minimum_the_loss_of_one_replica_fails_the_engine(
    tokenizer_dir: Path, sentence_ids: list[int]
) -> None:
    with running_server(tokenizer_dir, dp_size=2) as server:
        lost, kept = open_streams(server, sentence_ids)
        server.managers[0].close()
        assert b'"code":"unavailable"' in lost.read()
        assert b'"code":"unavailable"' in kept.read()
        assert server.request("GET", "/readyz")[0] == 503
        assert ask(server)[0] == 503


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("model_tp1 was ended by SIGKILL", "failing: model_tp1 was ended by SIGKILL."),
        ("the ranks disagree on a step", "failing: model_tp1: the ranks disagree on a step."),
    ],
)
def test_a_failure_names_the_rank_once(tokenizer_dir: Path, reason: str, words: str) -> None:
    with running_server(tokenizer_dir) as server:
        server.control.send(Failing("model_tp1", reason))
        while server.request("GET", "/readyz")[0] == 200:
            assert server.process.poll() is None
        status, answer = ask(server)
        assert status == 503
        assert answer["error"]["message"].endswith(words)


def test_the_server_is_ready_when_all_managers_are(tokenizer_dir: Path) -> None:
    with running_server(tokenizer_dir, dp_size=2, sends_info=False) as server:
        server.managers[1].send(INFO)
        server.wait_control(Progress)  # it listens
        assert server.request("GET", "/readyz")[0] == 503
        server.managers[0].send(INFO)
        server.wait_control(ChildReady)
        assert server.request("GET", "/readyz")[0] == 200


def test_each_rank_has_its_steps_cpu_seconds_and_memory_and_a_lost_one_holds_none(tokenizer_dir: Path) -> None:
    with running_server(tokenizer_dir, dp_size=2, dp_min_size=1) as server:
        ranks = [RankInfo(dp_rank=dp, tp_rank=tp, dp_size=2, tp_size=2) for dp in range(2) for tp in range(2)]
        reports = [RankReport(rank, 10 + index, 0.5 * index, 1000 * index) for index, rank in enumerate(ranks)]
        server.control.send(RankReports(tuple(reports)))
        label = '{rank="1",replica="1",stage="0"}'
        while f"toka_rank_steps_total{label}" not in (metrics := read_metrics(server)):
            assert server.process.poll() is None
        assert metrics[f"toka_rank_steps_total{label}"] == 13
        assert metrics[f"toka_rank_cpu_seconds_total{label}"] == 1.5
        assert metrics[f"toka_rank_memory_bytes{label}"] == 3000
        server.control.send(ReplicaLost(1, "model_dp1_tp0 was ended by SIGKILL"))
        while f"toka_rank_memory_bytes{label}" in (metrics := read_metrics(server)):
            assert server.process.poll() is None
        assert metrics[f"toka_rank_steps_total{label}"] == 13, "a counter never falls"
        assert metrics['toka_rank_memory_bytes{rank="1",replica="0",stage="0"}'] == 1000


def test_a_drain_waits_for_the_only_replica_that_has_work(tokenizer_dir: Path, sentence_ids: list[int]) -> None:
    with running_server(tokenizer_dir, dp_size=2, drain_endpoint_delay_s=0.0) as server:
        send_one(server.managers[0], sentence_ids)
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        body = json.dumps(completion_body(stream=True, max_tokens=100))
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        stream = connection.getresponse()
        assert stream.readline().startswith(b"data: ")
        server.control.send(Drain())
        while server.request("GET", "/readyz")[0] == 200:
            assert server.process.poll() is None
        (submit,) = server.managers[0].submits
        assert not server.managers[1].submits
        server.managers[0].send(whole(submit.first_stream, [], FINISH_LENGTH))
        assert b"[DONE]" in stream.read()
        connection.close()
        server.wait_control(Drained)
