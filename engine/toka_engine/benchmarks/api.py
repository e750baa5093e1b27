"""The HTTP server alone: tokens from a stub manager, requests from raw sockets, the server on one core.

Usage: python -m toka_engine.benchmarks.api [tokenizer=FOLDER] [connections=256] [seconds=5] [tokens=200] [KEY=VALUE]

The default folder is that of the built-in model, which the first use converts.

Prints one JSON object. `whole`: completions that are not streamed; `tiny`: the same with one token each, so that
requests are measured and not tokens; `events`: streams in which every token is an event of its own. For each, output
tokens per second of wall time and per second of the server's CPU time; the latter is what counts where the machine is
shared. `rss_mb`: the server's memory once it is ready, and after the measurement. `metrics`: the CPU time of reading
/metrics beside such streams, and its share where it is read once a second. This process, which plays manager and
clients, runs on the other cores. Other keys are the engine's own settings.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from toka_engine.builtin import ensure_builtin
from toka_engine.channel import Channel, socket_pair
from toka_engine.config import EngineConfig
from toka_engine.control_messages import ChildReady, FromChild, Start
from toka_engine.messages import FINISH_LENGTH, Deltas, EngineInfo, ServerToManager, Submit
from toka_engine.output import run_command

_PROMPT_TOKENS = 220
_VOCABULARY = 49152
_TOKEN = 253
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
"""The unit in which the kernel counts CPU time."""
_NUM_SCRAPES = 100
_LENGTH = re.compile(rb"content-length: (\d+)")


class _Bench:
    """A server process on one core, its manager's end, and client connections."""

    def __init__(self, tokenizer_dir: Path, num_connections: int, settings: dict[str, Any]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = self._port = probe.getsockname()[1]
        control, theirs = socket_pair()
        manager, manager_theirs = socket_pair()
        cores = sorted(os.sched_getaffinity(0))
        command = ["-m", "toka_engine.server", str(theirs.fileno()), str(manager_theirs.fileno())]
        self.process = subprocess.Popen([sys.executable, *command], pass_fds=(theirs.fileno(), manager_theirs.fileno()))
        os.sched_setaffinity(self.process.pid, cores[:1])
        os.sched_setaffinity(0, cores[1:] or cores)
        theirs.close()
        manager_theirs.close()
        self.control: Channel[Any] = Channel(control, FromChild)
        self.manager: Channel[Any] = Channel(manager, ServerToManager)
        config = msgspec.convert(
            {
                "log_level": "WARNING",
                "receive_timeout_s": 600,
                **settings,
                "host": "127.0.0.1",
                "port": port,
            },
            EngineConfig,
            strict=False,
        )
        self.control.send(Start(config, str(tokenizer_dir), str(tokenizer_dir)))
        self.manager.send(EngineInfo(_VOCABULARY, 4096, 1 << 20, num_connections, "cpu", "float32"))
        while not any(isinstance(message, ChildReady) for message in self.control.receive()):
            pass
        self.clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(num_connections)]
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.manager.fileno(), selectors.EVENT_READ, None)
        for number, client in enumerate(self.clients):
            client.setblocking(False)
            self.selector.register(client, selectors.EVENT_READ, number)

    def server_cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * _TICK_S

    def rss_mb(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)

    def scrape(self) -> int:
        """Read /metrics on a connection of its own; return the size of the answer."""
        with socket.create_connection(("127.0.0.1", self._port)) as client:
            client.sendall(b"GET /metrics HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n")
            answer = b"".join(iter(partial(client.recv, 65536), b""))
        if b"toka_requests_running" not in answer:
            raise SystemExit(f"/metrics answers {answer[:100]!r}")
        return len(answer)

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.process.kill()
        self.process.wait()


def _request(num_tokens: int, *, is_streamed: bool) -> bytes:
    body = json.dumps(
        {
            "model": "smollm2",
            "prompt": [_TOKEN] * _PROMPT_TOKENS,
            "max_tokens": num_tokens,
            "ignore_eos": True,
            "stream": is_streamed,
        }
    )
    head = "POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n{body}".encode()


def _run_whole(bench: _Bench, seconds: float, num_tokens: int) -> int:
    """Keep one request per connection running; return the number of output tokens."""
    request = _request(num_tokens, is_streamed=False)
    received = [b""] * len(bench.clients)
    num_done = 0
    for client in bench.clients:
        client.sendall(request)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for key, _ in bench.selector.select():
            if key.data is None:
                _answer_whole(bench, num_tokens)
                continue
            client = bench.clients[key.data]
            received[key.data] += client.recv(65536)
            if _is_whole(received[key.data]):
                received[key.data] = b""
                num_done += 1
                client.sendall(request)
    return num_done * num_tokens


def _is_whole(answer: bytes) -> bool:
    head, _, body = answer.partition(b"\r\n\r\n")
    length = _LENGTH.search(head)
    return length is not None and len(body) >= int(length[1])


def _answer_whole(bench: _Bench, num_tokens: int) -> None:
    submits = [message for message in bench.manager.receive_ready() if isinstance(message, Submit)]
    count = len(submits)
    bench.manager.send(
        Deltas(
            ended=np.array([submit.first_stream for submit in submits], np.int64),
            ended_reasons=np.full(count, FINISH_LENGTH, np.uint8),
            ended_num_tokens=np.full(count, num_tokens, np.int32),
            ended_lengths=np.full(count, num_tokens, np.int32),
            ended_tokens=np.full(count * num_tokens, _TOKEN, np.int32),
        )
    )


def _run_events(bench: _Bench, seconds: float) -> int:
    """Two groups of endless streams; a group's next step is sent when all its clients have the last one."""
    return _send_steps(bench, _start_streams(bench, _request(3000, is_streamed=True)), seconds)


def _send_steps(bench: _Bench, streams: np.ndarray[Any, Any], seconds: float) -> int:
    """Send steps to `streams` for so long and wait for the last events; return the number of events."""
    groups = np.array_split(streams, 2)
    group_of = [int(number >= len(groups[0])) for number in range(len(bench.clients))]
    missing = [0, 0]
    num_events = 0

    def step(group: int) -> None:
        ids = groups[group]
        missing[group] += len(ids)
        bench.manager.send(Deltas(streams=ids, tokens=np.full(len(ids), _TOKEN, np.int32)))

    step(0)
    step(1)
    until = time.monotonic() + seconds
    while any(missing):
        for key, _ in bench.selector.select():
            if key.data is None:
                bench.manager.receive_ready()
                continue
            count = bench.clients[key.data].recv(65536).count(b"data: ")
            num_events += count
            group = group_of[key.data]
            missing[group] -= count
            if missing[group] == 0 and time.monotonic() < until:
                step(group)
    return num_events


def _measure_metrics(
    tokenizer_dir: Path, num_connections: int, seconds: float, settings: dict[str, Any]
) -> dict[str, Any]:
    """Read /metrics between steps of as many streams as there are connections."""
    bench = _Bench(tokenizer_dir, num_connections, settings)
    try:
        streams = _start_streams(bench, _request(3000, is_streamed=True))
        _send_steps(bench, streams, seconds / 4)
        start_s, cpu_s = time.monotonic(), bench.server_cpu_s()
        _send_steps(bench, streams, seconds)
        wall_s, busy_s = time.monotonic() - start_s, bench.server_cpu_s() - cpu_s
        cpu_s = bench.server_cpu_s()
        for _ in range(_NUM_SCRAPES):
            size = bench.scrape()
        scrape_s = (bench.server_cpu_s() - cpu_s) / _NUM_SCRAPES
        return {
            "scrape_cpu_ms": round(scrape_s * 1e3, 2),
            "scrape_bytes": size,
            "streams_cpu_share": round(busy_s / wall_s, 3),
            "share_of_cpu": round(scrape_s / (busy_s / wall_s), 4),
        }
    finally:
        bench.close()


def _start_streams(bench: _Bench, request: bytes) -> np.ndarray[Any, Any]:
    """Return the stream of each client, in the order of the clients."""
    streams = []
    for client in bench.clients:
        client.sendall(request)
        (submit,) = [message for message in bench.manager.receive(10) if isinstance(message, Submit)]
        streams.append(submit.first_stream)
    return np.array(streams, np.int64)


def _measure(
    tokenizer_dir: Path, num_connections: int, seconds: float, num_tokens: int | None, settings: dict[str, Any]
) -> dict[str, Any]:
    bench = _Bench(tokenizer_dir, num_connections, settings)
    try:
        ready_mb = bench.rss_mb()
        cpu_s, start_s = bench.server_cpu_s(), time.monotonic()
        made = _run_events(bench, seconds) if num_tokens is None else _run_whole(bench, seconds, num_tokens)
        wall_s, cpu_s = time.monotonic() - start_s, bench.server_cpu_s() - cpu_s
        return {
            "tokens": made,
            "tokens_per_s": round(made / wall_s),
            "tokens_per_cpu_s": round(made / max(cpu_s, _TICK_S)),
            "cpu_share": round(cpu_s / wall_s, 3),
            "rss_mb": [ready_mb, bench.rss_mb()],
        }
    finally:
        bench.close()


def main() -> None:
    settings: dict[str, Any] = dict(argument.split("=", 1) for argument in sys.argv[1:])
    folder = Path(settings.pop("tokenizer")) if "tokenizer" in settings else ensure_builtin()
    num_connections = int(settings.pop("connections", 256))
    seconds, num_tokens = float(settings.pop("seconds", 5)), int(settings.pop("tokens", 200))
    settings = {key: {"T": True, "F": False}.get(value, value) for key, value in settings.items()}
    report: dict[str, Any] = {"connections": num_connections}
    for case, count in (("whole", num_tokens), ("tiny", 1), ("events", None)):
        report[case] = _measure(folder, num_connections, seconds, count, settings)
    report["metrics"] = _measure_metrics(folder, num_connections, seconds, settings)
    print(json.dumps(report))


if __name__ == "__main__":
    run_command(main, __doc__)
