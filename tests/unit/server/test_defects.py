"""A fault that nobody foresaw: the request in which it happens gets an answer, the log its place, the others go on.

The defects are real ones: a manager that sends a token which no vocabulary has, and a chat template that asks
for more memory than there is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.server.conftest import SENTENCE, chat_body, completion_body
from tests.unit.server.harness import RunningServer, each, running_server, speak, streams_of

_NO_TOKEN = 10**7
_SECRET = "a secret of the client"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """The file to which the process writes its standard error."""
    return tmp_path / "log"


@pytest.fixture
def logged_server(tokenizer_dir: Path, log: Path) -> Iterator[RunningServer]:
    with log.open("wb") as file, running_server(tokenizer_dir, stderr=file) as server:
        yield server


def _assert_internal_error(answer: bytes) -> None:
    error = json.loads(answer)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("server_error", None, "internal_error")


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 3, "logprobs": 1}], ids=["whole", "stream", "n"])
def test_a_defect_is_a_500_logged_once_and_others_go_on(
    logged_server: RunningServer, sentence_ids: list[int], log: Path, fields: dict[str, object]
) -> None:
    manager = logged_server.manager
    manager.on_submit = lambda submit: speak(manager, submit, [_NO_TOKEN])
    raw = json.dumps(completion_body(prompt=_SECRET, user=_SECRET, **fields)).encode()
    status, headers, answer = logged_server.request(
        "POST", "/v1/completions", raw, {"content-type": "application/json"}
    )
    assert (status, headers["content-type"]) == (500, "application/json")
    _assert_internal_error(answer)
    manager.on_submit = lambda submit: speak(manager, submit, sentence_ids)
    assert logged_server.post("/v1/completions", completion_body())[1]["choices"][0]["text"] == SENTENCE
    assert 'toka_requests_total{endpoint="/v1/completions",status="500"} 1.0' in _metrics(logged_server)
    assert "toka_requests_running 0.0" in _metrics(logged_server)
    written = log.read_text()
    assert written.count("error=IndexError") == 1
    assert written.count("Error") == 1  # nobody else, uvicorn above all, reports it again
    assert "render.py" in written
    assert _SECRET not in written


def test_a_defect_in_mid_stream_is_the_last_event_and_cancels(
    logged_server: RunningServer, sentence_ids: list[int], log: Path
) -> None:
    manager = logged_server.manager
    manager.on_submit = lambda submit: manager.send(each(streams_of(submit), sentence_ids[:1] * 2))
    raw = json.dumps(completion_body(stream=True, n=2)).encode()
    with logged_server.connect() as sock:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        sock.sendall(head + b"content-length: %d\r\n\r\n" % len(raw) + raw)
        received = b""
        while b'"text"' not in received:
            data = sock.recv(65536)
            assert data, received
            received += data
        running = streams_of(manager.submits[0])
        manager.send(each(running[:1], [_NO_TOKEN]))
        received += b"".join(iter(lambda: sock.recv(65536), b""))  # until the server closes
    assert received.startswith(b"HTTP/1.1 200")
    last = received.rpartition(b"data: ")[2].partition(b"\n\n")[0]
    _assert_internal_error(last)
    assert b"[DONE]" not in received
    manager.wait_for(lambda: manager.cancelled == set(running))
    assert log.read_text().count("error=IndexError") == 1


def _metrics(server: RunningServer) -> str:
    return server.request("GET", "/metrics")[2].decode()


def _with_template(tokenizer_dir: Path, folder: Path, source: str) -> Path:
    made = folder / "model"
    shutil.copytree(tokenizer_dir, made)
    (made / "chat_template.jinja").write_text(source)
    return made


def test_a_template_that_takes_all_memory_is_a_500(tokenizer_dir: Path, tmp_path: Path, log: Path) -> None:
    folder = _with_template(tokenizer_dir, tmp_path, "{{ messages[0].content * 10 ** 15 }}")
    with log.open("wb") as file, running_server(folder, stderr=file) as server:
        messages = [{"role": "user", "content": _SECRET}]
        status, answer = server.post("/v1/chat/completions", chat_body(messages=messages))
        assert status == 500
        _assert_internal_error(json.dumps(answer).encode())
        assert log.read_text().count("error=MemoryError") == 1
        assert _SECRET not in log.read_text()
        assert server.request("GET", "/livez")[0] == 200


_FAILING = {
    "divides-by-zero": ("{{ 1 // (messages | length - 1) }}", "ZeroDivisionError"),
    "recurses": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "adds-text-to-numbers": ("{{ messages[0].content + 1 }}", "TypeError"),
    "parses-numbers": ("{{ '%d' | format(messages[0].content) }}", "TypeError"),
    "calls-what-is-none": ("{{ none() }}", "TypeError"),
    "takes-too-large-a-range": ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
    "takes-what-is-missing": ("{{ messages[5].content }}", "messages"),
    "names-no-such-character": ("{{ '%c' | format(-1) }}", "OverflowError"),
}


@pytest.fixture(scope="module")
def templated_server(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One process whose template does what the first message names."""
    branches = "".join(
        f"{{% if messages[-1].content == '{name}' %}}{source}{{% endif %}}" for name, (source, _) in _FAILING.items()
    )
    with running_server(_with_template(tokenizer_dir, tmp_path_factory.mktemp("templates"), branches)) as server:
        yield server


@pytest.mark.parametrize(("name", "expected"), [(name, kind) for name, (_, kind) in _FAILING.items()], ids=_FAILING)
def test_a_template_that_fails_on_the_messages_is_a_400(
    templated_server: RunningServer, name: str, expected: str
) -> None:
    messages = [{"role": "user", "content": name}]
    status, answer = templated_server.post("/v1/chat/completions", chat_body(messages=messages))
    assert (status, answer["error"]["param"]) == (400, "messages")
    assert "chat template" in answer["error"]["message"]
    assert expected in answer["error"]["message"]
