"""A batch whose results find no room on the disk waits for it, says so, and loses nothing. Mounts, so it needs root."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import openai
import pytest

from tests.engine_process import WAIT_S
from tests.unit.server.conftest import sentence_ids, tokenizer, tokenizer_dir
from tests.unit.server.harness import running_server, speak
from tests.unit.server.test_batches import client_of, jsonl, line_of, results_of, wait_open, wait_until

__all__ = ["sentence_ids", "tokenizer", "tokenizer_dir"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_batch_waits_for_room_and_says_so(small_disk: Path, tokenizer_dir: Path, sentence_ids: list[int]) -> None:
    answer = partial(speak, ids=sentence_ids)
    with running_server(tokenizer_dir, answer=answer, data_dir=str(small_disk), min_free_disk_bytes=0) as server:
        wait_open(server)
        client = client_of(server)
        filler = small_disk / "filler"
        lines = [line_of(str(number)) for number in range(400)]
        file = client.files.create(file=("requests.jsonl", jsonl(lines)), purpose="batch")
        free = int(subprocess.check_output(["stat", "--file-system", "--format", "%a", str(small_disk)])) * 4096
        filler.write_bytes(b"x" * max(0, free - 96 * 1024))
        try:
            batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        except openai.APIStatusError as error:
            raise AssertionError(f"there was to be room for the batch itself: {error}") from error
        deadline = time.monotonic() + WAIT_S
        while not (errors := client.batches.retrieve(batch.id).errors):
            assert time.monotonic() < deadline
            time.sleep(0.1)  # a client's polling
        assert errors.data is not None
        assert [error.code for error in errors.data] == ["disk_full"]
        with pytest.raises(openai.APIStatusError) as refusal:
            client.files.create(file=b"x" * 512 * 1024, purpose="user_data")
        assert refusal.value.status_code == 507
        filler.unlink()
        batch = wait_until(client, batch.id, "completed")
        assert batch.errors is None
        assert set(results_of(client, batch.output_file_id)) == {str(number) for number in range(400)}
