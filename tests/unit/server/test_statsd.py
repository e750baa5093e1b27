"""statsd: what a real UDP socket gets from a running server."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from toka_engine.messages import Stats

from tests.engine_process import WAIT_S
from tests.unit.server.conftest import completion_body
from tests.unit.server.harness import running_server, speak


@pytest.fixture
def receiver() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(WAIT_S)
        yield sock


def report_from(receiver: socket.socket) -> dict[str, str]:
    """Return the lines of the next datagram, by name."""
    lines = receiver.recv(65536).decode().split("\n")
    return dict(line.split(":", 1) for line in lines)


def stats_of(output_tokens: int) -> Stats:
    return Stats(3, 4, 100, 60, 30, 1000, 400, output_tokens, 1, 50, 10, 1.5, 2.5, 2.0, 0.75)


def test_gauges_and_what_counters_have_grown_by_come_in_one_datagram(
    tokenizer_dir: Path, receiver: socket.socket, sentence_ids: list[int]
) -> None:
    address = f"127.0.0.1:{receiver.getsockname()[1]}"
    with running_server(tokenizer_dir, statsd_addr=address, stats_report_seconds=0.1, dp_size=2) as server:
        for manager in server.managers:
            manager.send(stats_of(2000))
        total = 0
        while total < 4000:
            report = report_from(receiver)
            total += int(report["toka.output_tokens"].removesuffix("|c"))
        assert total == 4000
        assert report["toka.running"] == "6|g"
        assert report["toka.waiting"] == "8|g"
        assert report["toka.kv_pages_used"] == "120|g"
        assert report["toka.requests_running"] == "0|g"
        assert set(report) >= {"toka.prompt_tokens", "toka.steps", "toka.preemptions", "toka.step_busy_s"}
        assert report_from(receiver)["toka.output_tokens"] == "0|c"
        server.managers[1].send(stats_of(2345))
        while (report := report_from(receiver))["toka.output_tokens"] == "0|c":
            pass
        assert report["toka.output_tokens"] == "345|c"
        assert all(len(line) < 60 for line in report)


def test_a_server_that_is_not_there_stops_nothing(tokenizer_dir: Path, sentence_ids: list[int]) -> None:
    with running_server(tokenizer_dir, statsd_addr="no-such-host.invalid:8125", stats_report_seconds=0.01) as server:
        server.manager.on_submit = lambda submit: speak(server.manager, submit, sentence_ids)
        for _ in range(5):
            assert server.post("/v1/completions", completion_body())[0] == 200
