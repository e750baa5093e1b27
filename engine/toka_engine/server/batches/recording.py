"""Records a running batch's results: many lines with one sync, and nothing counts before the database says so."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable

import msgspec

from toka_engine.server.batches.database import Database, DatabaseThread
from toka_engine.server.batches.folder import Folder, is_full
from toka_engine.server.batches.records import BatchError, BatchErrors, FileObject, RequestCounts, StoredBatch
from toka_engine.server.batches.results import DoneLines, LineResult, ResultFile, add_usage

logger = logging.getLogger("toka.server.batches")

_GATHER_S = 0.1
_MAX_PENDING = 1024
"""Results that may wait to be recorded; with more, no further line begins."""
_FULL_RETRY_S = 5.0


class Recorder:
    """The record of one batch. `stored` is as the database has it."""

    def __init__(self, stored: StoredBatch, folder: Folder, database: DatabaseThread) -> None:
        self.stored = stored
        self.done = DoneLines(stored.batch.request_counts.total, stored.done)
        self._folder = folder
        self._database = database
        self._output: ResultFile | None = None
        self._errors: ResultFile | None = None
        self._pending: list[LineResult] = []
        self._has_pending = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._commit_lock = asyncio.Lock()

    async def open(self) -> None:
        """Open the result files and cut them to the sizes that count."""

        def open_files(_: Database) -> tuple[ResultFile, ResultFile]:
            stored = self.stored
            output = ResultFile(self._folder.path_of(stored.output_id), stored.output_bytes)
            return output, ResultFile(self._folder.path_of(stored.error_id), stored.error_bytes)

        self._output, self._errors = await self._database.run(open_files)

    async def close(self) -> None:
        """Close the result files, behind a write that is under way."""

        def close_files(_: Database) -> None:
            for file in (self._output, self._errors):
                if file is not None:
                    file.close()
            self._output = self._errors = None

        await self._database.run(close_files)

    async def update(self, change: Callable[[StoredBatch], StoredBatch]) -> None:
        """Change the batch and store it. One change follows the other."""
        async with self._commit_lock:
            changed = change(self.stored)
            await self._database.run(Database.update_batch, changed)
            self.stored = changed

    async def add(self, result: LineResult) -> None:
        """Take a result; wait while too many are not on the disk yet."""
        self._pending.append(result)
        self._has_pending.set()
        if len(self._pending) >= _MAX_PENDING:
            self._has_room.clear()
        await self._has_room.wait()

    async def run(self) -> None:
        """Record what comes, until cancelled; then call `flush`."""
        while True:
            await self._has_pending.wait()
            await asyncio.sleep(_GATHER_S)
            while not await self._commit():
                await asyncio.sleep(_FULL_RETRY_S)

    async def flush(self) -> bool:
        """Record what is pending; False where the disk has no room for it."""
        return await self._commit()

    async def settle(self) -> None:
        """Record what is pending, and wait for room where there is none."""
        while not await self._commit():
            await asyncio.sleep(_FULL_RETRY_S)

    async def finish(self, ended: StoredBatch, results: list[FileObject]) -> None:
        """Store the batch's end with its result files, and wait for room where there is none."""
        while True:
            try:
                await self._database.run(Database.finish_batch, ended, results)
                self.stored = ended
                return
            except sqlite3.OperationalError as error:
                if not _tells_of_full_disk(error):
                    raise
            self._note_full_disk()
            await asyncio.sleep(_FULL_RETRY_S)

    async def _commit(self) -> bool:
        async with self._commit_lock:
            results, self._pending = self._pending, []
            self._has_pending.clear()
            if not results:
                return True
            done = DoneLines(self.stored.batch.request_counts.total, self.stored.done)
            for result in results:
                done.add(result.number)
            changed = self._with(results, done)
            try:
                await self._database.run(self._write, results, changed)
            except (OSError, sqlite3.OperationalError) as error:
                if not _tells_of_full_disk(error):
                    raise
                self._pending[:0] = results
                self._has_pending.set()
                self._note_full_disk()
                return False
            self.stored, self.done = changed, done
            self._has_room.set()
            return True

    def _with(self, results: list[LineResult], done: DoneLines) -> StoredBatch:
        """Return the batch with `results`, as it is when they are written. `done`: the lines that are answered then."""
        stored = self.stored
        counts = stored.batch.request_counts
        good = [result for result in results if result.is_success]
        bad = [result for result in results if not result.is_success]
        batch = msgspec.structs.replace(
            stored.batch,
            errors=None,
            request_counts=RequestCounts(counts.total, counts.completed + len(good), counts.failed + len(bad)),
            usage=add_usage(stored.batch.usage, results),
        )
        return msgspec.structs.replace(
            stored,
            batch=batch,
            output_bytes=stored.output_bytes + sum(len(result.data) for result in good),
            error_bytes=stored.error_bytes + sum(len(result.data) for result in bad),
            done=done.to_bytes(),
        )

    def _write(self, database: Database, results: list[LineResult], changed: StoredBatch) -> None:
        if self._output is None or self._errors is None:
            raise AssertionError("a result before `open`")
        try:
            self._output.append(b"".join(result.data for result in results if result.is_success))
            self._errors.append(b"".join(result.data for result in results if not result.is_success))
            database.update_batch(changed)
        except (OSError, sqlite3.Error):
            self._output.cut_to(self.stored.output_bytes)
            self._errors.cut_to(self.stored.error_bytes)
            raise

    def _note_full_disk(self) -> None:
        if self.stored.batch.errors is None:
            logger.error("event=disk_full batch=%s", self.stored.batch.id)
        self.note_fault("disk_full", "The results wait for room on the disk of `data_dir`.")

    def note_fault(self, code: str, message: str) -> None:
        """Say in the batch why it waits; only in memory, since it may be that nothing can be written."""
        errors = BatchErrors([BatchError(code=code, message=message)])
        self.stored = msgspec.structs.replace(
            self.stored, batch=msgspec.structs.replace(self.stored.batch, errors=errors)
        )


def _tells_of_full_disk(error: OSError | sqlite3.OperationalError) -> bool:
    if isinstance(error, OSError):
        return is_full(error)
    return error.sqlite_errorcode == sqlite3.SQLITE_FULL
