"""Input that is damaged, too large or ill-meant: clear errors, and nothing that was stored is destroyed."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import sqlite3
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from toka_engine.server.batches.database import Database
from toka_engine.server.batches.folder import Folder
from toka_engine.server.batches.lines import check_lines
from toka_engine.server.batches.records import FileObject, new_file_id
from toka_engine.server.batches.uploads import clean_name

from tests.unit.server.harness import RunningServer, running_server, speak
from tests.unit.server.test_batches import client_of, wait_open

COMPLETIONS = "/v1/completions"


def fill(folder: Path, number: int) -> set[str]:
    """A folder with so many stored files. Returns their ids."""
    taken = Folder.take(folder)
    assert taken is not None
    database = Database(taken.database)
    ids = set()
    for age in range(number):
        file = FileObject(id=new_file_id(), bytes=1, created_at=age, filename="x" * 50, purpose="batch")
        taken.path_of(file.id).write_bytes(b"x")
        database.add_file("owner", file)
        ids.add(file.id)
    database.close()
    taken.release()
    return ids


def open_folder(folder: Path) -> set[str]:
    """Open a folder as a server does; return the ids that it finds. Raises sqlite3.Error."""
    taken = Folder.take(folder)
    assert taken is not None
    try:
        taken.check_database()
        database = Database(taken.database)
        known = database.list_file_ids()
        taken.sweep(known)
        database.close()
    finally:
        taken.release()
    return known


def stored_in(folder: Path) -> set[str]:
    """The ids whose bytes are somewhere in a folder."""
    return {path.name for name in ("files", "lost") for path in (folder / name).glob("*")}


def test_a_database_cut_at_any_byte_is_refused_or_whole_and_no_file_is_lost(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    ids = fill(whole, 60)
    size = (whole / "toka.db").stat().st_size
    chance = random.Random(1)
    num_refused = 0
    for cut in (0, 1, 50, 99, 100, 4096, size - 1, *(chance.randrange(size) for _ in range(60))):
        folder = tmp_path / "cut"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        with (folder / "toka.db").open("r+b") as file:
            file.truncate(cut)
        try:
            assert open_folder(folder) == ids, f"cut at {cut}"
        except sqlite3.Error:
            num_refused += 1
        assert stored_in(folder) >= ids, f"cut at {cut}"
    assert num_refused > 50


def test_a_log_of_the_database_cut_at_any_byte_forgets_the_last_and_no_bytes_are_lost(tmp_path: Path) -> None:
    """A write-ahead log that was cut ends at its last whole transaction."""
    live = tmp_path / "live"
    taken = Folder.take(live)
    assert taken is not None
    database = Database(taken.database)
    made: list[str] = []
    for age in range(40):
        file = FileObject(id=new_file_id(), bytes=1, created_at=age, filename="f", purpose="batch")
        taken.path_of(file.id).write_bytes(b"x")
        database.add_file("owner", file)
        made.append(file.id)
    shutil.copytree(live, tmp_path / "copy")  # as after a crash: nothing is closed
    database.close()
    taken.release()
    size = (tmp_path / "copy/toka.db-wal").stat().st_size
    chance = random.Random(2)
    for cut in (0, 31, 32, size, *(chance.randrange(size) for _ in range(30))):
        folder = tmp_path / "cut"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "copy", folder)
        with (folder / "toka.db-wal").open("r+b") as log:
            log.truncate(cut)
        known = open_folder(folder)
        assert known == set(made[: len(known)]), "what is known is what was stored first"
        assert stored_in(folder) == set(made)
    assert known == set(made[: len(known)])


def test_what_the_database_does_not_know_is_kept_for_a_week(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    for name in ("file-stray", "file-cut.part"):
        (tmp_path / "files" / name).write_bytes(b"x")
    open_folder(tmp_path)
    assert (tmp_path / "lost/file-stray").exists()
    assert not (tmp_path / "files/file-cut.part").exists()
    os.utime(tmp_path / "lost/file-stray", (1, 1))
    open_folder(tmp_path)
    assert not (tmp_path / "lost/file-stray").exists()


@pytest.fixture(scope="module")
def server(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory, sentence_ids: list[int]) -> Any:
    folder = tmp_path_factory.mktemp("damage")
    with running_server(tokenizer_dir, answer=partial(speak, ids=sentence_ids), data_dir=str(folder)) as running:
        wait_open(running)
        yield running


def test_a_compressed_upload_is_refused_before_it_is_read(server: RunningServer) -> None:
    form = b'--b\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\n' + b"0" * 10_000_000
    kind = {"content-type": "multipart/form-data; boundary=b", "content-encoding": "gzip"}
    status, headers, body = server.request("POST", "/v1/files", gzip.compress(form), kind)
    assert status == 415
    assert headers["accept-encoding"] == "identity"
    assert "gzip" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "/etc/passwd", "..", "a/../../b", "C:\\boot.ini", "..\\x", "a\x00b", "\r\nset-cookie: x", ""],
)
def test_a_path_in_a_name_is_a_name(server: RunningServer, name: str) -> None:
    shown = clean_name(name)
    assert not {"/", "\\", "\x00", "\r", "\n"} & set(shown)
    assert shown
    file = client_of(server).files.create(file=(name or "x", b"data"), purpose="user_data")
    answer = client_of(server).files.content(file.id)
    assert answer.content == b"data"
    assert "set-cookie" not in answer.response.headers


def test_a_line_of_a_gibibyte_is_refused_with_its_number_and_without_its_memory(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    with path.open("wb") as file:
        line = {"custom_id": "a", "method": "POST", "url": COMPLETIONS, "body": {"prompt": "x"}}
        file.write(json.dumps(line).encode() + b"\n")
        file.truncate(1024**3)  # zeros without an end of line; they take no room on the disk
    tracemalloc.start()
    findings = check_lines(path, COMPLETIONS, max_lines=50_000, max_line_bytes=16 * 1024**2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    (error,) = findings.errors
    assert (error.code, error.line) == ("line_too_long", 2)
    assert peak < 128 * 1024**2
