"""The bounds of stored files: their number, their room on the disk, an upload's time, and how long they are kept."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
from toka_engine.server.batches import uploads

from tests.unit.server.harness import RunningServer, running_server, speak
from tests.unit.server.test_batches import client_of, line_of, start_batch, wait_open, wait_until

HOUR_S = 3600
UPLOAD_S = 1.5


@pytest.fixture(scope="module")
def server(
    tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory, sentence_ids: list[int]
) -> Iterator[RunningServer]:
    settings: dict[str, Any] = {"max_stored_files": 4, "upload_timeout_s": UPLOAD_S}
    folder = str(tmp_path_factory.mktemp("files"))
    answer = partial(speak, ids=sentence_ids)
    with running_server(tokenizer_dir, answer=answer, data_dir=folder, **settings) as running:
        wait_open(running)
        yield running


def test_a_file_more_than_may_be_stored_is_refused_by_the_keys_name(server: RunningServer) -> None:
    client = client_of(server, "many")
    files = [client.files.create(file=b"x", purpose="user_data") for _ in range(4)]
    with pytest.raises(openai.APIStatusError) as refusal:
        client.files.create(file=b"x", purpose="user_data")
    assert (refusal.value.status_code, refusal.value.code) == (507, "insufficient_storage")
    assert "max_stored_files" in refusal.value.message
    assert client_of(server, "another").files.create(file=b"x", purpose="user_data").id
    client.files.delete(files[0].id)
    assert client.files.create(file=b"x", purpose="user_data").id


def test_uploads_leave_what_is_to_be_free_of_the_disk(tokenizer_dir: Path, tmp_path: Path) -> None:
    more_than_free = shutil.disk_usage(tmp_path).total
    with running_server(tokenizer_dir, data_dir=str(tmp_path), min_free_disk_bytes=more_than_free) as server:
        wait_open(server)
        with pytest.raises(openai.APIStatusError) as refusal:
            client_of(server).files.create(file=b"x", purpose="user_data")
        assert refusal.value.status_code == 507
        assert "min_free_disk_bytes" in refusal.value.message
        assert list((tmp_path / "files").iterdir()) == []


def test_an_upload_that_makes_progress_for_ever_is_ended(server: RunningServer, tmp_path: Path) -> None:
    """The deadline of a body moves with its progress; the one of the whole upload does not."""
    head = (
        b"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000000\r\n"
        b"content-type: multipart/form-data; boundary=b\r\n\r\n"
        b'--b\r\ncontent-disposition: form-data; name="file"; filename="slow"\r\n\r\n'
    )
    began = time.monotonic()
    with server.connect() as sock:
        sock.sendall(head)
        sock.settimeout(0.1)
        answer = b""
        while not answer:
            assert time.monotonic() - began < 30
            sock.sendall(b"x" * 70_000)
            try:
                answer = sock.recv(65536)
            except TimeoutError:
                continue
        assert time.monotonic() - began >= UPLOAD_S
    assert answer.startswith(b"HTTP/1.1 408")
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert error["code"] == "upload_timeout"
    assert "upload_timeout_s" in error["message"]


def test_an_upload_that_stands_still_is_ended(tokenizer_dir: Path, tmp_path: Path) -> None:
    with running_server(tokenizer_dir, data_dir=str(tmp_path), receive_timeout_s=0.5) as server:
        wait_open(server)
        with server.connect() as sock:
            sock.sendall(
                b"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n"
                b"content-type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
            )
            answer = b"".join(iter(partial(receive, sock), b""))
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"receive_timeout" in answer
        wait_no_parts(tmp_path)


def receive(sock: socket.socket) -> bytes:
    return sock.recv(65536)


def wait_no_parts(folder: Path) -> None:
    """Wait until nothing is left of an upload: it is removed behind the answer."""
    deadline = time.monotonic() + 30
    while list((folder / "files").iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.02)  # nothing tells of it


@pytest.mark.parametrize(("part_s", "least_s", "most_s"), [(0.0, 0.19, 0.22), (0.0005, 0.19, 0.22), (0.01, 0.0, 0.0)])
def test_an_upload_leaves_the_servers_thread_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_s: float, least_s: float, most_s: float
) -> None:
    """Forty megabytes take 0.2 s at least; a client that is slower than that waits for nothing."""
    clock, pauses = [5.0], []

    async def pause(seconds: float) -> None:
        clock[0] += seconds + 0.001  # timers are late
        pauses.append(seconds + 0.001)

    async def parts() -> AsyncIterator[bytes]:
        yield b'--b\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\n'
        for _ in range(160):
            clock[0] += part_s
            yield bytes(250_000)
        yield b"\r\n--b--\r\n"

    monkeypatch.setattr(uploads.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(uploads.asyncio, "sleep", pause)
    upload = uploads.Upload(b"multipart/form-data; boundary=b", tmp_path / "file", 1 << 30)
    asyncio.run(upload.receive(parts()))
    assert (tmp_path / "file").stat().st_size == upload.num_bytes == 40_000_000
    assert least_s <= sum(pauses) + 160 * part_s * bool(pauses) <= most_s


def test_a_file_says_how_long_it_is_kept(server: RunningServer) -> None:
    client = client_of(server, "expiry")
    month = client.files.create(file=b"x", purpose="user_data")
    assert month.expires_at == month.created_at + 30 * 24 * HOUR_S
    hour = client.files.create(
        file=b"x", purpose="user_data", expires_after={"anchor": "created_at", "seconds": HOUR_S}
    )
    assert hour.expires_at == hour.created_at + HOUR_S


@pytest.mark.parametrize(
    ("after", "param"),
    [
        ({"anchor": "created_at", "seconds": HOUR_S - 1}, "expires_after[seconds]"),
        ({"anchor": "created_at", "seconds": 30 * 24 * HOUR_S + 1}, "expires_after[seconds]"),
        ({"anchor": "created_at", "seconds": "soon"}, "expires_after[seconds]"),
        ({"anchor": "last_used_at", "seconds": HOUR_S}, "expires_after[anchor]"),
        ({"seconds": HOUR_S}, "expires_after[anchor]"),
        ({"anchor": "created_at"}, "expires_after[seconds]"),
    ],
)
def test_a_wrong_time_for_a_file_is_named(server: RunningServer, after: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client_of(server, "wrong").files.create(file=b"x", purpose="user_data", expires_after=after)
    assert refusal.value.param == param
    assert list(client_of(server, "wrong").files.list()) == []


def test_results_of_a_batch_are_kept_for_the_time_that_it_names_and_else_for_ever(server: RunningServer) -> None:
    client = client_of(server, "results")
    after = {"anchor": "created_at", "seconds": 2 * HOUR_S}
    for more, life_s in (({"output_expires_after": after}, 2 * HOUR_S), ({}, None)):
        batch = wait_until(client, start_batch(client, [line_of("a")], **more).id, "completed")
        output = client.files.retrieve(batch.output_file_id)
        assert output.expires_at == (None if life_s is None else output.created_at + life_s)
        assert output.purpose == "batch_output"
        assert batch.expires_at == batch.created_at + 24 * HOUR_S
        for file in client.files.list():
            client.files.delete(file.id)
    for wrong in ({"anchor": "created_at", "seconds": 1}, {"anchor": "now", "seconds": HOUR_S}):
        with pytest.raises(openai.BadRequestError) as refusal:
            start_batch(client, [line_of("a")], output_expires_after=wrong)
        assert refusal.value.param is not None
        assert refusal.value.param.startswith("output_expires_after")
