"""Kills the server of a long batch again and again: `python -m tests.fault.batch_kills --lines 50000 --kills 100`.

A real server process with a scripted manager runs one batch through all of its lives; each life ends by SIGKILL after a
random number of lines was begun, one in ten before the server is ready at all, and one in ten by a drain, which lets
lines in flight end while others are being written. In the end the output has to hold each
line of the input once, and nothing else. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
from toka_engine.control_messages import ChildReady

from tests.unit.server.conftest import make_tokenizer_dir
from tests.unit.server.harness import INFO, MODEL, RunningServer, speak

URL = "/v1/completions"
SENTENCE = " Paris, which is also its largest city."
LIFE_S = 900.0
"""No life waits longer for its lines; it ends a hang."""
KILLED_EARLY = 0.1
"""The share of lives that end before the server is ready."""
DRAINED = 0.1
"""The share of lives that end by a drain."""


def start_server(tokenizer_dir: Path, folder: Path, ids: list[int]) -> RunningServer:
    """Start a server that is not ready before `become_ready`, and whose manager answers every line at once."""
    answer = partial(speak, ids=ids)
    settings: dict[str, Any] = {"data_dir": str(folder), "access_log": False, "drain_endpoint_delay_s": 0.0}
    return RunningServer(tokenizer_dir, sends_info=False, answer=answer, **settings)


def become_ready(server: RunningServer) -> None:
    server.manager.send(INFO)
    server.wait_control(ChildReady)


def wait_begun(server: RunningServer, number: int) -> None:
    """Wait until this life of the server has begun so many lines."""
    server.manager.wait_for(lambda: len(server.manager.submits) >= number, LIFE_S)


def kill(server: RunningServer) -> None:
    server.process.kill()
    server.stop()


def drain(server: RunningServer) -> None:
    server.drain()
    server.process.wait(LIFE_S)
    server.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=50_000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = kill_again_and_again(Path(folder), chosen.lines, chosen.kills, random.Random(chosen.seed))
    print(json.dumps(figures), flush=True)
    return 0 if figures["lost"] == figures["repeated"] == figures["half"] == 0 else 1


def kill_again_and_again(folder: Path, num_lines: int, num_kills: int, chance: random.Random) -> dict[str, Any]:
    """Return what became of the lines, and the seconds from ready to the first line of each life."""
    tokenizer_dir = make_tokenizer_dir()
    ids = tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")).encode(SENTENCE).ids
    began, resumes = time.monotonic(), []
    server = start_server(tokenizer_dir, folder, ids)
    become_ready(server)
    batch_id, expected = _start(server, num_lines)
    num_early = num_drained = 0
    for number in range(num_kills):
        # What is left is spread over the kills that are left, so that the batch is not over before the last of them.
        left = num_lines - _progress(server, batch_id)
        share = max(1, 2 * left // (num_kills - number + 1))
        wait_begun(server, min(left, len(server.manager.submits) + chance.randrange(share)))
        is_drained = chance.random() < DRAINED
        num_drained += is_drained
        (drain if is_drained else kill)(server)
        server = start_server(tokenizer_dir, folder, ids)
        while chance.random() < KILLED_EARLY:
            time.sleep(chance.random())  # some moment of a start: loading, opening the folder, waiting for the model
            kill(server)
            num_early += 1
            server = start_server(tokenizer_dir, folder, ids)
        become_ready(server)
        ready = time.monotonic()
        wait_begun(server, 1)
        resumes.append(time.monotonic() - ready)
        if number % 10 == 9:
            print(f"kills={number + 1} done={_progress(server, batch_id)}", file=sys.stderr, flush=True)
    figures = _judge(server, _wait(server, batch_id), expected)
    kill(server)
    ordered = sorted(resumes)
    return {
        "lines": num_lines,
        "kills": num_kills + num_early - num_drained,
        "drains": num_drained,
        "kills_before_ready": num_early,
        **figures,
        "resume_s_median": round(statistics.median(ordered), 3) if ordered else None,
        "resume_s_max": round(ordered[-1], 3) if ordered else None,
        "seconds": round(time.monotonic() - began, 1),
    }


def _start(server: RunningServer, num_lines: int) -> tuple[str, set[str]]:
    names = [f"line-{number}" for number in range(num_lines)]
    body = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 4}
    lines = ({"custom_id": name, "method": "POST", "url": URL, "body": body} for name in names)
    data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    head = b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    head += b'--b\r\ncontent-disposition: form-data; name="file"; filename="lines.jsonl"\r\n\r\n'
    kind = {"content-type": "multipart/form-data; boundary=b"}
    while True:
        status, _, answer = server.request("POST", "/v1/files", head + data + b"\r\n--b--\r\n", kind)
        if status != 503:
            break
        time.sleep(0.05)  # the folder opens beside the start
    file = json.loads(answer)
    status, batch = server.post(
        "/v1/batches", {"input_file_id": file["id"], "endpoint": URL, "completion_window": "24h"}
    )
    if status != 200:
        raise AssertionError(batch)
    return batch["id"], set(names)


def _progress(server: RunningServer, batch_id: str) -> int:
    batch = _find(server, batch_id)
    return int(batch["request_counts"]["completed"])


def _find(server: RunningServer, batch_id: str) -> dict[str, Any]:
    while True:
        status, _, answer = server.request("GET", f"/v1/batches/{batch_id}")
        if status == 200:
            found: dict[str, Any] = json.loads(answer)
            return found
        if status != 503:
            raise AssertionError(answer)
        time.sleep(0.02)  # the folder opens beside the start


def _wait(server: RunningServer, batch_id: str) -> dict[str, Any]:
    while (batch := _find(server, batch_id))["status"] not in ("completed", "failed", "expired", "cancelled"):
        time.sleep(0.25)
    return batch


def _judge(server: RunningServer, batch: dict[str, Any], expected: set[str]) -> dict[str, Any]:
    status, _, content = server.request("GET", f"/v1/files/{batch['output_file_id']}/content")
    if status != 200 or batch["error_file_id"] is not None:
        raise AssertionError(batch)
    found: list[str] = []
    num_half = 0
    for line in content.split(b"\n")[:-1]:
        try:
            result = json.loads(line)
            found.append(result["custom_id"])
            num_half += not result["response"]["body"]["choices"][0]["text"]
        except (ValueError, KeyError):
            num_half += 1
    num_half += not content.endswith(b"\n")
    names = set(found)
    return {
        "lost": len(expected - names),
        "repeated": len(found) - len(names),
        "half": num_half + len(names - expected),
        "counted": batch["request_counts"],
    }


if __name__ == "__main__":
    sys.exit(main())
