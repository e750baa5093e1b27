"""A batch whose results find no room on the disk waits for it, says so, and loses nothing. Mounts, so it needs root."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from toka_engine.control_messages import ChildReady, Progress

from tests.engine_process import WAIT_S
from tests.unit.server.conftest import sentence_ids, tokenizer, tokenizer_dir
from tests.unit.server.harness import INFO, running_server, speak
from tests.unit.server.test_batches import client_of, jsonl, line_of, results_of, wait_open, wait_until

__all__ = ["sentence_ids", "tokenizer", "tokenizer_dir"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, left: int) -> Path:
    """Write a file that leaves `left` bytes of the disk free."""
    free = int(subprocess.check_output(["stat", "--file-system", "--format", "%a", str(disk)])) * 4096
    filler = disk / "filler"
    filler.write_bytes(b"x" * max(0, free - left))
    return filler


def wait_full(client: openai.OpenAI, batch_id: str) -> None:
    """Wait until a batch says that it waits for the disk."""
    deadline = time.monotonic() + WAIT_S
    while not (errors := client.batches.retrieve(batch_id).errors):
        assert time.monotonic() < deadline
        time.sleep(0.1)  # a client's polling
    assert errors.data is not None
    assert [error.code for error in errors.data] == ["disk_full"]


def test_a_batch_waits_for_room_and_says_so(small_disk: Path, tokenizer_dir: Path, sentence_ids: list[int]) -> None:
    answer = partial(speak, ids=sentence_ids)
    with running_server(tokenizer_dir, answer=answer, data_dir=str(small_disk), min_free_disk_bytes=0) as server:
        wait_open(server)
        client = client_of(server)
        lines = [line_of(str(number)) for number in range(400)]
        file = client.files.create(file=("requests.jsonl", jsonl(lines)), purpose="batch")
        filler = fill(small_disk, 96 * 1024)
        try:
            batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        except openai.APIStatusError as error:
            raise AssertionError(f"there was to be room for the batch itself: {error}") from error
        wait_full(client, batch.id)
        with pytest.raises(openai.APIStatusError) as refusal:
            client.files.create(file=b"x" * 512 * 1024, purpose="user_data")
        assert refusal.value.status_code == 507
        filler.unlink()
        batch = wait_until(client, batch.id, "completed")
        assert batch.errors is None
        assert set(results_of(client, batch.output_file_id)) == {str(number) for number in range(400)}


def test_a_full_disk_refuses_what_it_cannot_note_and_lets_go_of_files(
    small_disk: Path, tokenizer_dir: Path, sentence_ids: list[int]
) -> None:
    """A batch that is checked, created or cancelled on a full disk waits or is refused; a deletion makes room."""
    answer = partial(speak, ids=sentence_ids)
    settings: dict[str, Any] = {"data_dir": str(small_disk), "min_free_disk_bytes": 0, "sends_info": False}
    with running_server(tokenizer_dir, answer=answer, **settings) as server:
        while server.wait_control(Progress).phase != "wait":
            pass
        wait_open(server)
        client = client_of(server)
        lines = client.files.create(file=("requests.jsonl", jsonl([line_of("a")])), purpose="batch")
        large = client.files.create(file=b"x" * 512 * 1024, purpose="user_data")
        wanted: Any = {"input_file_id": lines.id, "endpoint": "/v1/completions", "completion_window": "24h"}
        batch = client.batches.create(**wanted)
        fill(small_disk, 0)
        for refused in (partial(client.batches.create, **wanted), partial(client.batches.cancel, batch.id)):
            with pytest.raises(openai.APIStatusError) as refusal:
                refused()
            assert refusal.value.status_code == 507
            assert "disk" in refusal.value.message
        server.manager.send(INFO)
        server.wait_control(ChildReady)
        wait_full(client, batch.id)
        assert client.files.delete(large.id).deleted
        assert wait_until(client, batch.id, "completed").errors is None
        assert [file.id for file in client.files.list(purpose="user_data")] == []


def test_an_upload_that_fills_the_disk_is_refused_and_leaves_its_room(small_disk: Path, tokenizer_dir: Path) -> None:
    """An upload in chunks does not say beforehand how large it will be."""

    def parts() -> Iterator[bytes]:
        yield b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nuser_data\r\n'
        yield b'--b\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\n'
        for _ in range(4):
            yield b"x" * 1024 * 1024
        yield b"\r\n--b--\r\n"

    with running_server(tokenizer_dir, data_dir=str(small_disk), min_free_disk_bytes=0) as server:
        wait_open(server)
        kind = {"content-type": "multipart/form-data; boundary=b"}
        answer = httpx.post(f"{server.url}/v1/files", content=parts(), headers=kind, timeout=WAIT_S)
        assert answer.status_code == 507
        assert answer.json()["error"]["code"] == "insufficient_storage"
        assert list((small_disk / "files").iterdir()) == []
        assert client_of(server).files.create(file=b"x" * 1024 * 1024, purpose="user_data").bytes == 1024 * 1024


@pytest.mark.parametrize("is_new", [True, False])
def test_a_start_on_a_full_disk_waits_for_room_where_it_needs_any(
    small_disk: Path, tokenizer_dir: Path, sentence_ids: list[int], is_new: bool
) -> None:
    answer = partial(speak, ids=sentence_ids)
    settings: dict[str, Any] = {"answer": answer, "data_dir": str(small_disk), "min_free_disk_bytes": 0}
    ids: list[str] = []
    if not is_new:
        with running_server(tokenizer_dir, **settings) as server:
            wait_open(server)
            ids.append(client_of(server).files.create(file=b"x" * 65536, purpose="user_data").id)
            server.drain()
            server.process.wait(WAIT_S)
    filler = fill(small_disk, 0)
    with running_server(tokenizer_dir, **settings) as server:
        if is_new:
            deadline = time.monotonic() + WAIT_S
            while b"is full" not in (answered := server.request("GET", "/v1/files"))[2]:
                assert time.monotonic() < deadline, answered
            assert answered[0] == 503
            filler.unlink()
        wait_open(server)
        assert [file.id for file in client_of(server).files.list()] == ids
        for stored in ids:
            assert client_of(server).files.delete(stored).deleted
