"""An answer of the API server becomes the error that says who waits for it: one object, or everything."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from kubernetes import client
from toka_operator.cluster import Cluster
from toka_operator.errors import ApiError, OperatorError, TransientError, WriteFailsError

SERVICE = {"apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "n", "name": "chat", "uid": "u"}}


class Answers:
    """An API server that gives every request the same answer."""

    def __init__(self) -> None:
        self.status, self.body = 200, b""

    def set(self, status: int, **fields: Any) -> None:
        self.status, self.body = status, json.dumps({"kind": "Status", **fields}).encode()


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def cluster(answers: Answers) -> Iterator[Cluster]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(answers.status)
            self.send_header("Content-Length", str(len(answers.body)))
            self.end_headers()
            self.wfile.write(answers.body)

        do_GET = do_POST = do_PATCH = answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    configuration = client.Configuration(host=f"http://127.0.0.1:{server.server_address[1]}")
    configuration.retries = False
    yield Cluster(client.ApiClient(configuration), lambda: 30.0)
    server.shutdown()
    server.server_close()


def error_of(call: Any, *arguments: Any) -> OperatorError:
    with pytest.raises(OperatorError) as caught:
        call(*arguments)
    return caught.value


@pytest.mark.parametrize(
    ("status", "message", "of_one"),
    [
        (500, "Internal error occurred: failed to allocate a serviceIP: range is full", True),
        (500, 'Internal error occurred: failed calling webhook "p": EOF', True),
        (503, "the server is currently unable to handle the request", False),
        (504, "Timeout: request did not complete within the allotted timeout", False),
        (429, "too many requests", False),
        (401, "Unauthorized", False),
    ],
)
def test_a_write_at_which_the_server_itself_fails_concerns_one_object(
    cluster: Cluster, answers: Answers, status: int, message: str, of_one: bool
) -> None:
    answers.set(status, reason="R", message=message)
    for call in (lambda: cluster.create(SERVICE), lambda: cluster.apply_status(SERVICE)):
        error = error_of(call)
        assert isinstance(error, TransientError)
        assert isinstance(error, WriteFailsError) == of_one
        assert str(error) == f"{status} R: {message}"
    read = error_of(cluster.read, "Service", "n", "chat")
    assert (isinstance(read, TransientError), isinstance(read, WriteFailsError)) == (True, False)


@pytest.mark.parametrize("status", [400, 403, 404, 409, 422])
def test_a_refusal_is_no_outage(cluster: Cluster, answers: Answers, status: int) -> None:
    answers.set(status, reason="R", message="no")
    error = error_of(cluster.create, SERVICE)
    assert isinstance(error, ApiError)
    assert error.status == status


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b"{}", b'{"metadata": {}}', b'{"metadata": {"resourceVersion": ""}}']
)
def test_a_list_that_is_none_is_asked_for_again_and_ends_no_watch(
    cluster: Cluster, answers: Answers, body: bytes
) -> None:
    """A proxy on the way may answer 200 with anything."""
    answers.body = body
    assert isinstance(error_of(cluster.list_all, "Service", None), TransientError)


@pytest.mark.parametrize(
    "event",
    [
        b"[]",
        b'{"type": "ADDED"}',
        b'{"type": "ADDED", "object": {"metadata": {}}}',
        b'{"type": "ADDED", "object": {"metadata": {"name": "x", "resourceVersion": ""}}}',
        b'{"type": "BOOKMARK", "object": {"metadata": []}}',
        b"<html>",
    ],
)
def test_an_event_that_is_none_breaks_the_stream_and_ends_no_watch(
    cluster: Cluster, answers: Answers, event: bytes
) -> None:
    answers.body = event + b"\n"
    assert isinstance(error_of(list, cluster.watch("Service", None, "5")), TransientError)
