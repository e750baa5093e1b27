"""The life of the server process: start, keys, cancellation, failure, drain, and what it must not load."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from toka_engine.control_messages import ChildReady, Drained, Failed, Failing, Progress, Unresponsive
from toka_engine.errors import ExitCode
from toka_engine.messages import Stats

from tests.engine_process import WAIT_S
from tests.unit.server.conftest import SENTENCE, chat_body, completion_body
from tests.unit.server.harness import (
    INFO,
    MODEL,
    ROOT,
    RunningServer,
    each,
    end,
    running_server,
    speak,
    streams_of,
)

_JSON = {"content-type": "application/json"}


def _open_stream(server: RunningServer, body: dict[str, Any], ids: list[int]) -> tuple[socket.socket, bytes]:
    """A streamed completion of which the first token has arrived: its socket and what was read."""
    manager = server.manager
    manager.on_submit = lambda submit: manager.send(each(streams_of(submit), ids[:1] * submit.num_choices))
    sock = server.connect()
    _post_raw(sock, "/v1/completions", {**body, "stream": True})
    received = b""
    while b'"text"' not in received:
        data = sock.recv(65536)
        assert data, received
        received += data
    return sock, received


def _post_raw(sock: socket.socket, path: str, body: dict[str, Any]) -> None:
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    sock.sendall(f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw)


def _begin_request(server: RunningServer, raw: bytes) -> socket.socket:
    """A completion that has been let in and whose body `raw` is waited for."""
    sock = server.connect()
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nexpect: 100-continue\r\n"
    sock.sendall(f"{head}content-length: {len(raw)}\r\n\r\n".encode())
    assert sock.recv(65536).startswith(b"HTTP/1.1 100")
    return sock


def _read_all(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(65536), b""))


def _num_cancelled(server: RunningServer) -> float:
    text = server.request("GET", "/metrics")[2].decode()
    return float(text.partition("\ntoka_requests_cancelled_total ")[2].partition("\n")[0])


# ---------------------------------------------------------------- start


def test_until_the_engine_is_ready_only_liveness_answers(tokenizer_dir: Path) -> None:
    with running_server(tokenizer_dir, sends_info=False) as server:
        assert server.wait_control(Progress).detail == "tokenizer"
        server.wait_control(Progress)
        assert server.request("GET", "/livez")[0] == 200
        status, _, answer = server.request("GET", "/readyz")
        assert (status, json.loads(answer)["phase"]) == (503, "starting")
        status, headers, answer = server.request("POST", "/v1/completions", b"{}", _JSON)
        assert (status, headers["retry-after"]) == (503, "1")
        assert json.loads(answer)["error"]["type"] == "server_error"
        server.control.send(Progress("load", "layer 3 of 30", "model"))
        while b"layer 3 of 30" not in server.request("GET", "/readyz")[2]:
            pass
        server.manager.send(INFO)
        server.wait_control(ChildReady)
        assert server.request("GET", "/readyz")[0] == 200


def test_a_port_in_use_is_said_and_ends_the_process(tokenizer_dir: Path) -> None:
    with running_server(tokenizer_dir) as first:
        second = RunningServer(tokenizer_dir, sends_info=False, port=first.port)
        try:
            fatal = second.wait_control(Failed)
            assert (fatal.exit_code, str(first.port) in fatal.message) == (ExitCode.PORT_IN_USE, True)
            assert second.process.wait(WAIT_S) == ExitCode.PORT_IN_USE
        finally:
            second.stop()


def test_a_folder_without_a_tokenizer_ends_the_process(tmp_path: Path) -> None:
    with running_server(tmp_path, sends_info=False) as server:
        fatal = server.wait_control(Failed)
        assert (fatal.exit_code, "tokenizer.json" in fatal.message) == (ExitCode.MODEL_INVALID, True)


def test_the_served_name_and_its_aliases_are_taken(tokenizer_dir: Path, sentence_ids: list[int]) -> None:
    with running_server(tokenizer_dir, served_model_name="main", model_aliases=("org/other",)) as server:
        server.manager.on_submit = lambda submit: speak(server.manager, submit, sentence_ids)
        for name in ("main", "org/other"):
            status, answer = server.post("/v1/completions", completion_body(model=name))
            assert (status, answer["model"]) == (200, name)
            assert server.request("GET", f"/v1/models/{name}")[0] == 200
        assert server.post("/v1/completions", completion_body())[0] == 404
        models = json.loads(server.request("GET", "/v1/models")[2])["data"]
        assert [card["id"] for card in models] == ["main", "org/other"]


# ---------------------------------------------------------------- keys


@pytest.fixture(scope="module")
def keyed_server(tokenizer_dir: Path) -> Any:
    with running_server(tokenizer_dir, env={"TOKA_API_KEY": "sécret-key"}) as server:
        yield server


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic x", "secret-key", "Bearer s\u00e9cret-ke"],
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/nothing", "/v1"])
def test_a_wrong_key_is_a_401_everywhere_under_v1(keyed_server: RunningServer, header: str | None, path: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        headers = {} if header is None else {"authorization": header.encode().decode("latin-1")}
        status, sent, answer = keyed_server.request(method, path, None, headers)
        assert (status, json.loads(answer)["error"]["code"]) == (401, "invalid_api_key")
        assert sent["www-authenticate"] == "Bearer"


def test_the_right_key_is_taken_and_probes_need_none(keyed_server: RunningServer) -> None:
    right = {"authorization": "Bearer sécret-key".encode().decode("latin-1")}
    assert keyed_server.request("GET", "/v1/models", None, right)[0] == 200
    for path in ("/ping", "/livez", "/readyz", "/metrics"):
        assert keyed_server.request("GET", path)[0] == 200


# ---------------------------------------------------------------- clients that leave


@pytest.mark.parametrize("num_choices", [1, 8])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_client_that_leaves_cancels_its_streams(server: RunningServer, num_choices: int, is_streamed: bool) -> None:
    manager = server.manager
    manager.on_submit = lambda submit: None
    with server.connect() as sock:
        _post_raw(sock, "/v1/completions", completion_body(n=num_choices, stream=is_streamed))
        manager.wait_for(lambda: bool(manager.submits))
    manager.wait_for(lambda: manager.cancelled == set(streams_of(manager.submits[0])))


def test_a_client_that_leaves_in_mid_stream_cancels_it(server: RunningServer, sentence_ids: list[int]) -> None:
    sock, _ = _open_stream(server, completion_body(), sentence_ids)
    sock.close()
    manager = server.manager
    manager.wait_for(lambda: manager.cancelled == set(streams_of(manager.submits[0])))
    manager.send(each(streams_of(manager.submits[0]), sentence_ids[:1]), end(streams_of(manager.submits[0]), 2))
    assert "toka_requests_running 0.0" in server.request("GET", "/metrics")[2].decode()


def test_a_client_that_leaves_half_a_body_submits_nothing(server: RunningServer) -> None:
    with server.connect() as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
        sock.sendall(b'content-length: 100\r\n\r\n{"model":')
    assert server.post("/v1/completions", completion_body())[0] == 200
    assert len(server.manager.submits) == 1


def test_a_client_that_leaves_while_its_texts_are_encoded_submits_nothing(server: RunningServer) -> None:
    before = _num_cancelled(server)
    with server.connect() as sock:
        _post_raw(sock, "/v1/completions", completion_body(prompt=["hello wor " * 900] * 1000))
    while _num_cancelled(server) == before:
        pass
    assert server.manager.submits == []


def test_a_client_that_leaves_while_its_ids_are_read_submits_nothing(server: RunningServer) -> None:
    """The event loop had a turn meanwhile: else the end of the connection would have been seen too late."""
    before = _num_cancelled(server)
    with server.connect() as sock:
        _post_raw(sock, "/v1/completions", completion_body(prompt=[list(range(2000))] * 1024, max_tokens=4))
    while _num_cancelled(server) == before:
        pass
    assert server.manager.submits == []


def test_a_large_prompt_of_ids_arrives_whole(server: RunningServer) -> None:
    prompts = [list(range(first, first + 2000)) for first in range(1024)]
    status, answer = server.post("/v1/completions", completion_body(prompt=prompts, max_tokens=4))
    assert (status, len(answer["choices"])) == (200, 1024)
    assert [submit.prompt_ids.tolist() for submit in server.manager.submits] == prompts


def test_streams_are_never_numbered_twice(server: RunningServer) -> None:
    for num_choices in (3, 1, 2):
        server.post("/v1/completions", completion_body(n=num_choices))
    numbers = [stream for submit in server.manager.submits for stream in streams_of(submit)]
    assert len(set(numbers)) == len(numbers) == 6


def test_tokens_of_unknown_streams_are_dropped(server: RunningServer, sentence_ids: list[int]) -> None:
    server.manager.send(each([10**12, 0], sentence_ids[:2]), end([10**12 + 1], 5))
    assert server.post("/v1/completions", completion_body())[1]["choices"][0]["text"] == SENTENCE


def test_a_finished_request_leaves_nothing_to_cancel(server: RunningServer) -> None:
    for _ in range(20):
        assert server.post("/v1/completions", completion_body())[0] == 200
    assert server.manager.cancelled == set()


# ---------------------------------------------------------------- failure


@pytest.mark.parametrize("how", ["manager-gone", "failing"])
def test_a_failure_answers_all_who_wait_at_once(tokenizer_dir: Path, sentence_ids: list[int], how: str) -> None:
    with running_server(tokenizer_dir) as server:
        streaming, received = _open_stream(server, completion_body(), sentence_ids)
        waiting = server.connect()
        _post_raw(waiting, "/v1/chat/completions", chat_body())
        server.manager.wait_for(lambda: len(server.manager.submits) == 2)
        if how == "failing":
            server.control.send(Failing("model", "exit code 9"))
        else:
            server.manager.close()
        waiting.settimeout(20)
        assert waiting.recv(65536).startswith(b"HTTP/1.1 503")
        received += _read_all(streaming)
        assert b'data: {"error":{"message":"The engine has failed' in received
        assert b"[DONE]" not in received
        status, _, answer = server.request("GET", "/readyz")
        assert (status, json.loads(answer)["phase"]) == (503, "failing")
        assert server.post("/v1/completions", completion_body())[0] == 503
        assert server.request("GET", "/livez")[0] == 200


@pytest.mark.parametrize("how", ["manager-gone", "failing"])
def test_a_request_that_was_let_in_before_a_failure_is_answered_too(tokenizer_dir: Path, how: str) -> None:
    raw = json.dumps(completion_body()).encode()
    with running_server(tokenizer_dir) as server, _begin_request(server, raw) as sock:
        if how == "failing":
            server.control.send(Failing("model", "exit code 9"))
        else:
            server.manager.close()
        while server.request("GET", "/readyz")[0] == 200:
            pass
        sock.sendall(raw)
        assert sock.recv(65536).startswith(b"HTTP/1.1 503")
        if how == "failing":
            server.wait_control(Drained)


def test_a_broken_frame_of_the_manager_ends_the_process(tokenizer_dir: Path) -> None:
    with running_server(tokenizer_dir) as server:
        server.manager.send(Failing("not", "a message of this link"))
        assert server.wait_control(Failed).exit_code == ExitCode.PROCESS_DIED
        assert server.process.wait(WAIT_S) == ExitCode.PROCESS_DIED


def test_a_silent_process_takes_readiness_away_until_it_answers(server: RunningServer) -> None:
    server.control.send(Unresponsive("model"))
    while (answer := server.request("GET", "/readyz"))[0] == 200:
        pass
    assert b"model does not answer" in answer[2]
    server.control.send(Unresponsive(""))
    while server.request("GET", "/readyz")[0] != 200:
        pass


def test_heartbeats_are_answered_and_short(server: RunningServer) -> None:
    assert 0 <= server.ping().busy_s < 5


# ---------------------------------------------------------------- drain


def test_a_drain_lets_running_streams_finish_and_then_ends(tokenizer_dir: Path, sentence_ids: list[int]) -> None:
    with running_server(tokenizer_dir, drain_endpoint_delay_s=0.5) as server:
        manager = server.manager
        sock, received = _open_stream(server, completion_body(), sentence_ids)
        running = manager.submits[0]
        manager.on_submit = lambda submit: speak(manager, submit, sentence_ids)
        server.drain()
        while server.request("GET", "/readyz")[0] == 200:
            pass
        status, headers, _ = server.request("POST", "/v1/completions", json.dumps(completion_body()).encode(), _JSON)
        assert (status, headers["connection"]) == (200, "close")
        while server.post("/v1/completions", completion_body())[0] == 200:
            pass
        manager.send(each(streams_of(running), sentence_ids[1:2]), end(streams_of(running), 2))
        received += _read_all(sock)
        assert b"[DONE]" in received
        server.wait_control(Drained)
        assert server.process.wait(WAIT_S) == 0


def test_a_drain_that_takes_too_long_ends_streams_with_an_error(tokenizer_dir: Path, sentence_ids: list[int]) -> None:
    with running_server(tokenizer_dir, drain_endpoint_delay_s=0, drain_timeout_s=0.2) as server:
        sock, received = _open_stream(server, completion_body(), sentence_ids)
        server.drain()
        received += _read_all(sock)
        assert b"shutting down" in received
        server.manager.wait_for(lambda: server.manager.cancelled == set(streams_of(server.manager.submits[0])))
        server.wait_control(Drained)
        assert server.process.wait(WAIT_S) == 0


def test_a_request_that_was_let_in_before_the_drains_end_is_answered_too(
    tokenizer_dir: Path, sentence_ids: list[int]
) -> None:
    raw = json.dumps(completion_body()).encode()
    with running_server(tokenizer_dir, drain_endpoint_delay_s=0, drain_timeout_s=0.2) as server:
        streaming, received = _open_stream(server, completion_body(), sentence_ids)
        with _begin_request(server, raw) as sock:
            server.drain()
            received += _read_all(streaming)
            assert b"shutting down" in received
            sock.sendall(raw)
            assert _read_all(sock).startswith(b"HTTP/1.1 503")
        server.wait_control(Drained)
        assert server.manager.submits[1:] == []


def test_an_idle_server_drains_although_connections_are_open(tokenizer_dir: Path) -> None:
    with running_server(tokenizer_dir, drain_endpoint_delay_s=0) as server, server.connect() as sock:
        sock.sendall(b"GET /ping HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = b""
        while b"pong" not in answer:
            answer += sock.recv(65536)
        server.drain()
        server.wait_control(Drained)
        assert _read_all(sock) == b""


# ---------------------------------------------------------------- metrics and memory


def test_metrics_show_requests_and_the_managers_figures(server: RunningServer) -> None:
    server.post("/v1/completions", completion_body())
    server.manager.send(Stats(3, 4, 100, 60, 30, 1000, 400, 2000, 1, 50, 10, 1.5, 2.5, 2.0, 0.75))
    while "toka_waiting 4.0" not in (text := server.request("GET", "/metrics")[2].decode()):
        pass
    for line in (
        "toka_ready 1.0",
        "toka_running 3.0",
        "toka_kv_pages_used 60.0",
        "toka_output_tokens_total 2000.0",
        "toka_manager_cpu_seconds_total 1.5",
        "toka_step_wall_seconds_total 2.5",
        "toka_step_busy_seconds_total 2.0",
        "toka_model_cpu_seconds_total 0.75",
    ):
        assert f"\n{line}\n" in text
    assert 'toka_requests_total{endpoint="/v1/completions",status="200"}' in text


def test_the_package_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import pkgutil, importlib, sys, toka_engine.server as package\n"
        "for module in pkgutil.walk_packages(package.__path__, 'toka_engine.server.'):\n"
        "    module.name.endswith('__main__') or importlib.import_module(module.name)\n"
        "print(sorted({'torch', 'transformers', 'safetensors'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT / "engine")}, capture_output=True)
    assert (out.stdout.decode().strip(), out.returncode) == ("[]", 0), out.stderr.decode()


def test_the_process_is_small_and_maps_no_torch(server: RunningServer) -> None:
    for _ in range(50):
        server.post("/v1/chat/completions", chat_body(n=20))
    process = psutil.Process(server.process.pid)
    assert process.memory_info().rss <= 135e6
    assert not any("torch" in part.path for part in process.memory_maps())


def test_only_the_http_port_listens(server: RunningServer) -> None:
    sockets = psutil.Process(server.process.pid).net_connections(kind="inet")
    assert {part.laddr.port for part in sockets if part.status == psutil.CONN_LISTEN} == {server.port}


def test_many_requests_at_once_all_get_their_own_answer(server: RunningServer, sentence_ids: list[int]) -> None:
    manager = server.manager
    manager.on_submit = lambda submit: speak(manager, submit, [28 + len(submit.prompt_ids)])
    texts: dict[int, str] = {}

    def ask(length: int) -> None:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        chunks = client.completions.create(model=MODEL, prompt=[5] * length, max_tokens=4, stream=length % 2 == 0)
        if length % 2:
            texts[length] = chunks.choices[0].text  # type: ignore[union-attr]
        else:
            texts[length] = "".join(chunk.choices[0].text for chunk in chunks)  # type: ignore[union-attr]

    threads = [threading.Thread(target=ask, args=(length,)) for length in range(1, 41)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {length: server_text(server, 28 + length) for length in range(1, 41)}
    assert texts == expected


def server_text(server: RunningServer, token: int) -> str:
    """The text that the server writes for one token, asked for alone."""
    server.manager.on_submit = lambda submit: speak(server.manager, submit, [token])
    text: str = server.post("/v1/completions", completion_body(prompt=[5], max_tokens=4))[1]["choices"][0]["text"]
    return text


@pytest.mark.slow
def test_the_benchmark_of_the_server_reports_its_rates(tokenizer_dir: Path) -> None:
    command = [sys.executable, "-m", "toka_engine.benchmarks.api", f"tokenizer={tokenizer_dir}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "engine")}
    out = subprocess.run([*command, "connections=4", "seconds=0.2", "tokens=5"], env=env, capture_output=True)
    assert out.returncode == 0, out.stderr.decode()
    report = json.loads(out.stdout)
    assert all(
        report[kind][rate] > 0 for kind in ("whole", "tiny", "events") for rate in ("tokens_per_s", "tokens_per_cpu_s")
    )
    assert report["metrics"]["scrape_bytes"] > 1000
    assert report["metrics"]["share_of_cpu"] > 0
