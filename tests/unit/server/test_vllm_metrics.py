"""vLLM's metric names: those that the documents list, of these types and labels, with the engine's figures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from toka_engine.histogram import Histogram
from toka_engine.messages import FINISH_ERROR, FINISH_LENGTH, Durations, Stats, Submit

from tests.engine_process import ROOT
from tests.unit.server.conftest import chat_body, completion_body
from tests.unit.server.harness import MODEL, RunningServer, end, running_server, speak, streams_of, wait_until

_ROW = re.compile(r"^\| `(vllm:\w+)` \| (\w+) \| (.+) \|$", re.MULTILINE)
_OWN = {"le"}


def families_of(server: RunningServer) -> dict[str, Any]:
    page = server.request("GET", "/metrics")[2].decode()
    return {family.name: family for family in text_string_to_metric_families(page)}


def value_of(server: RunningServer, sample_name: str, **labels: str) -> float:
    """Return the one sample of this name that has these labels."""
    families = families_of(server).values()
    samples = [sample for family in families for sample in family.samples if sample.name == sample_name]
    (found,) = [sample for sample in samples if labels.items() <= sample.labels.items()]
    return float(found.value)


@pytest.fixture
def pair(pair: RunningServer, sentence_ids: list[int]) -> RunningServer:
    """Both managers answer at once."""
    for manager in pair.managers:
        manager.on_submit = lambda submit, manager=manager: speak(manager, submit, sentence_ids)
    return pair


def durations_of(seconds: float, count: int) -> Durations:
    histogram = Histogram()
    histogram.add(seconds, count)
    return Durations(*[histogram.report()] * 5)


def stats_of(pages_used: int, durations: Durations) -> Stats:
    return Stats(3, 4, 100, pages_used, 30, 1000, 400, 2000, 1, 50, 10, 1.5, 2.5, 2.0, 0.75, durations)


def test_names_types_and_labels_are_those_of_the_document(server: RunningServer) -> None:
    listed = {
        name: (kind, set(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels in _ROW.findall((ROOT / "docs" / "observability.md").read_text())
    }
    served = {}
    for name, family in families_of(server).items():
        if name.startswith("vllm:"):
            labels = {label for sample in family.samples for label in sample.labels} - _OWN
            served[name + "_total" * (family.type == "counter")] = family.type, labels
    assert served == listed
    assert len(listed) >= 18


def test_the_replicas_figures_are_one(pair: RunningServer) -> None:
    for manager, used in zip(pair.managers, (60, 20), strict=True):
        manager.send(stats_of(used, durations_of(0.04, 5)))
    wait_until(lambda: "toka_waiting 8.0" in pair.request("GET", "/metrics")[2].decode())  # both have come
    expected = {
        "vllm:num_requests_running": 6.0,
        "vllm:num_requests_waiting": 8.0,
        "vllm:kv_cache_usage_perc": 0.4,
        "vllm:gpu_cache_usage_perc": 0.4,
        "vllm:prompt_tokens_total": 2000.0,
        "vllm:generation_tokens_total": 4000.0,
        "vllm:prefix_cache_queries_total": 2000.0,
        "vllm:prefix_cache_hits_total": 800.0,
        "vllm:num_preemptions_total": 2.0,
        "vllm:inter_token_latency_seconds_count": 10.0,
        "vllm:request_queue_time_seconds_count": 10.0,
    }
    for name, value in expected.items():
        assert value_of(pair, name, model_name=MODEL, engine="0") == value, name
    assert value_of(pair, "vllm:inter_token_latency_seconds_sum") == pytest.approx(0.4)
    assert value_of(pair, "vllm:inter_token_latency_seconds_bucket", le="0.03") == 0.0
    assert value_of(pair, "vllm:inter_token_latency_seconds_bucket", le="0.04") == 10.0
    assert value_of(pair, "vllm:inter_token_latency_seconds_bucket", le="+Inf") == 10.0
    assert value_of(pair, "vllm:cache_config_info", block_size="16", num_gpu_blocks="200") == 1.0


def ends_of(server: RunningServer) -> dict[str, float]:
    name = "vllm:request_success_total"
    return {reason: value_of(server, name, finished_reason=reason) for reason in ("stop", "length", "abort", "error")}


def test_each_choice_counts_by_the_reason_of_its_end(server: RunningServer) -> None:
    def count(path: str, body: dict[str, Any]) -> dict[str, float]:
        before = ends_of(server)
        num_before = value_of(server, "vllm:e2e_request_latency_seconds_count")
        status, _ = server.post(path, body)
        after = ends_of(server)
        assert value_of(server, "vllm:e2e_request_latency_seconds_count") - num_before == (status == 200)
        return {reason: after[reason] - before[reason] for reason in after if after[reason] != before[reason]}

    def fail(submit: Submit) -> None:
        server.manager.send(end(streams_of(submit), 0, FINISH_ERROR))

    assert count("/v1/completions", completion_body(n=3)) == {"stop": 3.0}
    assert count("/v1/chat/completions", chat_body(max_tokens=2)) == {"length": 1.0}
    server.manager.on_submit = lambda submit: server.manager.send(end(streams_of(submit), 1, FINISH_LENGTH))
    assert count("/v1/completions", completion_body(max_tokens=1)) == {"length": 1.0}
    server.manager.on_submit = lambda submit: None
    assert count("/v1/completions", completion_body(timeout_s=0.1)) == {"abort": 1.0}
    server.manager.on_submit = fail
    assert count("/v1/completions", completion_body()) == {"error": 1.0}
    server.manager.on_submit = lambda submit: speak(server.manager, submit, [10**7])  # no token: a defect of ours
    assert count("/v1/completions", completion_body()) == {"error": 1.0}
    assert count("/v1/completions", completion_body(temperature=9)) == {}


def test_they_can_be_left_out(tokenizer_dir: Path) -> None:
    with running_server(tokenizer_dir, vllm_metric_names=False) as server:
        assert server.post("/v1/completions", completion_body(temperature=9))[0] == 400
        page = server.request("GET", "/metrics")[2].decode()
    assert "vllm:" not in page
    assert "toka_ready 1.0" in page
