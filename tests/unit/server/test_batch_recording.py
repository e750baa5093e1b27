"""The record of a batch, on a real folder and database: a drain or a cancellation may come at any moment of a write."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import msgspec
import pytest
from toka_engine.server.batches.database import Database, DatabaseThread
from toka_engine.server.batches.folder import Folder
from toka_engine.server.batches.recording import Recorder
from toka_engine.server.batches.records import (
    Batch,
    BatchUsage,
    CachedTokens,
    FileObject,
    ReasoningTokens,
    RequestCounts,
    StoredBatch,
    new_batch_id,
    new_file_id,
)
from toka_engine.server.batches.results import DoneLines, LineResult, add_usage
from toka_engine.server.request import CompletionTokensDetails, PromptTokensDetails, Usage

NUM_LINES = 20
LARGE = b'{"large": "%s"}\n' % (b"x" * 8_000_000)
"""A result whose write takes long enough to be seen."""


class Store:
    """A folder with one running batch, and what it says of it afterwards."""

    def __init__(self, folder: Folder, database: DatabaseThread, stored: StoredBatch) -> None:
        self.folder = folder
        self.database = database
        self.stored = stored

    async def read(self) -> StoredBatch:
        found = await self.database.run(Database.find_batch, "owner", self.stored.batch.id)
        assert found is not None
        return found

    async def read_output(self) -> tuple[list[bytes], set[int]]:
        """The lines of output that count, and the numbers of those that are noted as answered."""
        stored = await self.read()
        data = self.folder.path_of(stored.output_id).read_bytes()[: stored.output_bytes]
        assert len(data) == stored.output_bytes
        done = DoneLines(NUM_LINES, stored.done)
        return data.splitlines(keepends=True), {number for number in range(NUM_LINES) if number in done}

    async def wait_written(self) -> None:
        """Return while the first result is being written: its bytes come into the file before they are synced."""
        path = self.folder.path_of(self.stored.output_id)
        async with asyncio.timeout(30):
            while not path.stat().st_size:
                await asyncio.sleep(0)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    folder = Folder.take(tmp_path)
    assert folder is not None
    database = await DatabaseThread.open(folder.database)
    batch = Batch(
        id=new_batch_id(),
        endpoint="/v1/completions",
        input_file_id=new_file_id(),
        completion_window="24h",
        status="in_progress",
        created_at=1,
        request_counts=RequestCounts(NUM_LINES),
    )
    stored = StoredBatch(owner="owner", batch=batch, output_id=new_file_id(), error_id=new_file_id())
    await database.run(Database.add_file, "owner", file_of(batch.input_file_id))
    assert await database.run(Database.add_batch, stored)
    yield Store(folder, database, stored)
    await database.close()
    folder.release()


def file_of(file_id: str) -> FileObject:
    return FileObject(id=file_id, bytes=0, created_at=1, filename="f", purpose="batch")


async def test_the_input_of_a_batch_is_not_forgotten_and_no_batch_begins_without_its_input(store: Store) -> None:
    input_id = store.stored.batch.input_file_id
    assert not await store.database.run(Database.remove_file, input_id)
    assert await store.database.run(Database.find_file, "owner", input_id) is not None
    other = msgspec.structs.replace(store.stored.batch, id=new_batch_id(), input_file_id=new_file_id())
    assert not await store.database.run(Database.add_batch, msgspec.structs.replace(store.stored, batch=other))
    assert await store.database.run(Database.list_unfinished) == [store.stored]


def result_of(number: int, data: bytes) -> LineResult:
    return LineResult(number=number, is_success=True, data=data)


async def test_the_end_of_a_record_waits_for_the_write_that_is_under_way(store: Store) -> None:
    recorder = Recorder(store.stored, store.folder, store.database)
    await recorder.open()
    recording = asyncio.create_task(recorder.run())
    await recorder.add(result_of(0, LARGE))
    await store.wait_written()
    await recorder.add(result_of(1, b"{}\n"))
    await recorder.end(recording)
    assert await store.read_output() == ([LARGE, b"{}\n"], {0, 1})


async def test_a_write_whose_caller_is_cancelled_counts_and_the_next_one_goes_behind_it(store: Store) -> None:
    recorder = Recorder(store.stored, store.folder, store.database)
    await recorder.open()
    await recorder.add(result_of(0, LARGE))
    settling = asyncio.create_task(recorder.settle())
    await store.wait_written()
    settling.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await settling
    recording = asyncio.create_task(recorder.run())
    await recorder.add(result_of(1, b"{}\n"))
    await recorder.end(recording)
    assert await store.read_output() == ([LARGE, b"{}\n"], {0, 1})
    assert (await store.read()).batch.request_counts.completed == 2


async def test_a_batch_that_is_cancelled_while_its_end_is_stored_stays_over(store: Store) -> None:
    def move(stored: StoredBatch, status: str) -> StoredBatch:
        return msgspec.structs.replace(stored, batch=msgspec.structs.replace(stored.batch, status=status))

    recorder = Recorder(store.stored, store.folder, store.database)
    output = file_of(store.stored.output_id)
    await asyncio.gather(
        recorder.finish(partial(move, status="completed"), [output]),
        recorder.update(partial(move, status="cancelling")),
    )
    assert recorder.stored.batch.status == "completed"
    assert (await store.read()).batch.status == "completed"
    assert await store.database.run(Database.list_unfinished) == []


def test_the_usage_of_a_batch_is_the_sum_of_its_lines_with_cached_and_reasoning_tokens() -> None:
    def answered(cached: int, **more: CompletionTokensDetails) -> LineResult:
        usage = Usage(10, 4, 14, PromptTokensDetails(cached), **more)
        return LineResult(number=0, is_success=True, data=b"", usage=usage)

    lines = [answered(6), answered(2, completion_tokens_details=CompletionTokensDetails(3))]
    refused = LineResult(number=1, is_success=False, data=b"")
    once = add_usage(BatchUsage(), [*lines, refused])
    assert once == BatchUsage(
        input_tokens=20,
        output_tokens=8,
        total_tokens=28,
        input_tokens_details=CachedTokens(8),
        output_tokens_details=ReasoningTokens(3),
    )
    assert add_usage(once, lines).input_tokens_details.cached_tokens == 16
