"""Uploads a file of 200 MiB to a real server process: `python -m tests.fault.batch_uploads`.

Prints one JSON object: the megabytes a second, the seconds of CPU time that the server took, the growth of its resident
memory, and the latency of completions that are asked for meanwhile, beside that of the same without an upload. The
manager is scripted, so that the server alone is measured; the upload comes from a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from tests.unit.server.conftest import make_tokenizer_dir
from tests.unit.server.harness import MODEL, RunningServer, running_server, speak

PIECE = 256 * 1024
BODY = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 4}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mebibytes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=0, help="megabytes a second of the client at most; 0: no limit")
    parser.add_argument("--folder", help="where the files go; default: a temporary folder")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        ids = [7042, 28, 527, 314]
        with running_server(make_tokenizer_dir(), answer=partial(speak, ids=ids), data_dir=folder) as server:
            wait_until_open(server)
            ask(server, 200)  # what grows once, grows here
            upload(server, 4, 0)
            rounds = [measure(server, chosen.mebibytes, chosen.rate * 1e6) for _ in range(chosen.rounds)]
    best = max(rounds, key=lambda each: float(each["megabytes_a_second"]))
    print(json.dumps({"mebibytes": chosen.mebibytes, "rounds": rounds, "best": best}), flush=True)
    return 0


def wait_until_open(server: RunningServer) -> None:
    while server.request("GET", "/v1/files")[0] == 503:
        time.sleep(0.02)  # the folder opens beside the start


def measure(server: RunningServer, mebibytes: int, rate: float) -> dict[str, Any]:
    """Return the figures of one upload, after as many requests without one."""
    alone = ask(server, 300)
    is_over = threading.Event()
    beside: list[float] = []
    asking = threading.Thread(target=lambda: beside.extend(ask(server, 0, is_over)))
    pid = server.process.pid
    memory, cpu = resident_bytes(pid), cpu_s(pid)
    asking.start()
    began = time.monotonic()
    client = multiprocessing.get_context("fork").Process(target=upload, args=(server, mebibytes, rate))
    client.start()
    client.join()
    wall_s = time.monotonic() - began
    is_over.set()
    asking.join()
    if client.exitcode:
        raise AssertionError(f"the upload's client ended with {client.exitcode}")
    per_request_s = cpu_per_request(server)
    return {
        "megabytes_a_second": round(mebibytes * 1.048576 / wall_s, 1),
        "server_cpu_s": round(cpu_s(pid) - cpu - per_request_s * len(beside), 2),
        "rss_growth_mb": round((peak_bytes(pid) - memory) / 1e6, 1),
        "others": len(beside),
        "others_ms": percentiles(beside),
        "alone_ms": percentiles(alone),
    }


def upload(server: RunningServer, mebibytes: int, rate: float) -> None:
    """Send a file, at most `rate` bytes a second unless that is 0, and check that all of it arrived."""
    head = b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nuser_data\r\n'
    head += b'--b\r\ncontent-disposition: form-data; name="file"; filename="large"\r\n\r\n'
    tail = b"\r\n--b--\r\n"
    line = json.dumps({"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": BODY}).encode() + b"\n"
    piece = (line * (PIECE // len(line) + 1))[:PIECE]
    number = mebibytes * 1024 * 1024 // PIECE
    size = len(head) + len(tail) + number * PIECE
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")  # the peak begins anew
    with server.connect() as sock:
        sock.sendall(
            b"POST /v1/files HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n"
            b"content-type: multipart/form-data; boundary=b\r\n\r\n" % size + head
        )
        began = time.monotonic()
        for index in range(number):
            sock.sendall(piece)
            if rate:
                time.sleep(max(0.0, began + (index + 1) * PIECE / rate - time.monotonic()))
        sock.sendall(tail)
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    status, _, body = answer.partition(b"\r\n\r\n")
    if not status.startswith(b"HTTP/1.1 200") or json.loads(body)["bytes"] != number * PIECE:
        raise AssertionError(answer)
    server.request("DELETE", f"/v1/files/{json.loads(body)['id']}")


def ask(server: RunningServer, number: int, until: threading.Event | None = None) -> list[float]:
    """Ask for completions one after the other, `number` of them or until the event; return the seconds of each."""
    found: list[float] = []
    while (len(found) < number) if until is None else not until.is_set():
        began = time.monotonic()
        status, answer = server.post("/v1/completions", BODY)
        if status != 200:
            raise AssertionError(answer)
        found.append(time.monotonic() - began)
    return found


def cpu_per_request(server: RunningServer) -> float:
    before = cpu_s(server.process.pid)
    ask(server, 200)
    return (cpu_s(server.process.pid) - before) / 200


def percentiles(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100) if len(seconds) > 1 else [0.0] * 99
    return {"p50": round(cuts[49] * 1000, 2), "p99": round(cuts[98] * 1000, 2)}


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    return _status(pid, "VmRSS")


def peak_bytes(pid: int) -> int:
    return _status(pid, "VmHWM")


def _status(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    sys.exit(main())
