"""Records a running batch's results: many lines with one sync, and nothing counts before the database says so."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import Callable
from typing import TypeVar

import msgspec

from toka_engine.server.batches.database import Database, DatabaseThread
from toka_engine.server.batches.folder import Folder
from toka_engine.server.batches.records import BatchError, BatchErrors, FileObject, RequestCounts, StoredBatch
from toka_engine.server.batches.results import DoneLines, LineResult, ResultFile, add_usage
from toka_engine.server.errors import is_full

logger = logging.getLogger("toka.server.batches")

T = TypeVar("T")
Change = Callable[[StoredBatch], StoredBatch]
"""Makes a batch as it is to be from the batch as it is stored."""
_GATHER_S = 0.1
_MAX_PENDING = 1024
"""Results that may wait to be recorded; with more, no further line begins."""
_FULL_RETRY_S = 5.0


class Recorder:
    """The record of one batch.

    What the database has and what this object says that it has change together, in the database's thread: a caller that
    is cancelled while a write is under way, as in a drain, leaves both whole, and the next write goes on behind it.
    """

    def __init__(self, stored: StoredBatch, folder: Folder, database: DatabaseThread) -> None:
        self.done = DoneLines(stored.batch.request_counts.total, stored.done)
        self._stored = stored
        self._fault: BatchErrors | None = None
        self._folder = folder
        self._database = database
        self._output: ResultFile | None = None
        self._errors: ResultFile | None = None
        self._pending: list[LineResult] = []
        self._has_pending = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._commit_lock = asyncio.Lock()

    @property
    def stored(self) -> StoredBatch:
        """The batch as the database has it, with what it waits for now in its `errors`."""
        if self._fault is None:
            return self._stored
        return msgspec.structs.replace(
            self._stored, batch=msgspec.structs.replace(self._stored.batch, errors=self._fault)
        )

    async def open(self) -> None:
        """Open the result files and cut them to the sizes that count. Wait for room where there is none."""

        def open_files(_: Database) -> None:
            stored = self._stored
            self._output = self._output or ResultFile(self._folder.path_of(stored.output_id), stored.output_bytes)
            self._errors = self._errors or ResultFile(self._folder.path_of(stored.error_id), stored.error_bytes)

        await self._until_room(open_files)

    async def end(self, recording: asyncio.Task[None]) -> None:
        """Stop `recording`, which runs `run`, between two writes; record what is pending where there is room for it."""
        try:
            async with self._commit_lock:
                recording.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await recording
            await self._commit()
        finally:
            recording.cancel()
            await self._close()

    async def _close(self) -> None:
        """Close the result files, behind a write that is under way."""

        def close_files(_: Database) -> None:
            for file in (self._output, self._errors):
                if file is not None:
                    file.close()
            self._output = self._errors = None

        await self._database.run(close_files)

    async def update(self, change: Change, *, waits_for_room: bool = False) -> None:
        """Change the batch and store it, unless it is over. One change follows the other. Raises OSError where there is
        no room for it on the disk, or waits for room.
        """

        def store(database: Database) -> None:
            if self._stored.is_over:
                return
            changed = change(self._stored)
            database.update_batch(changed)
            self._stored = changed
            self.done = DoneLines(changed.batch.request_counts.total, changed.done)

        await (self._until_room(store) if waits_for_room else self._database.run(store))

    async def add(self, result: LineResult) -> None:
        """Take a result; wait while too many are not on the disk yet."""
        self._pending.append(result)
        self._has_pending.set()
        if len(self._pending) >= _MAX_PENDING:
            self._has_room.clear()
        await self._has_room.wait()

    async def run(self) -> None:
        """Record what comes, until `end`."""
        while True:
            await self._has_pending.wait()
            await asyncio.sleep(_GATHER_S)
            while not await self._commit():
                await asyncio.sleep(_FULL_RETRY_S)

    async def settle(self) -> None:
        """Record what is pending, and wait for room where there is none."""
        while not await self._commit():
            await asyncio.sleep(_FULL_RETRY_S)

    async def finish(self, change: Change, results: list[FileObject]) -> None:
        """Store the batch's end with its result files, and wait for room where there is none."""

        def store(database: Database) -> None:
            ended = change(self._stored)
            database.finish_batch(ended, results)
            self._stored = ended

        await self._until_room(store)

    async def _until_room(self, write: Callable[[Database], T]) -> T:
        while True:
            try:
                result = await self._database.run(write)
            except OSError as error:
                if not is_full(error):
                    raise
            else:
                self._fault = None
                return result
            self._note_full_disk()
            await asyncio.sleep(_FULL_RETRY_S)

    async def _commit(self) -> bool:
        """Record what is pending; False where the disk has no room for it."""
        async with self._commit_lock:
            results, self._pending = self._pending, []
            self._has_pending.clear()
            if not results:
                return True
            try:
                await self._database.run(self._write, results)
            except OSError as error:
                if not is_full(error):
                    raise
                self._pending[:0] = results
                self._has_pending.set()
                self._note_full_disk()
                return False
            self._fault = None
            self._has_room.set()
            return True

    def _write(self, database: Database, results: list[LineResult]) -> None:
        if self._output is None or self._errors is None:
            raise AssertionError("a result before `open`")
        changed, done = self._with(results)
        try:
            self._output.append(b"".join(result.data for result in results if result.is_success))
            self._errors.append(b"".join(result.data for result in results if not result.is_success))
            database.update_batch(changed)
        except (OSError, sqlite3.Error):
            self._output.cut_to(self._stored.output_bytes)
            self._errors.cut_to(self._stored.error_bytes)
            raise
        self._stored, self.done = changed, done

    def _with(self, results: list[LineResult]) -> tuple[StoredBatch, DoneLines]:
        """Return the batch and its answered lines as they are when `results` are written."""
        stored = self._stored
        counts = stored.batch.request_counts
        done = DoneLines(counts.total, stored.done)
        for result in results:
            done.add(result.number)
        good = [result for result in results if result.is_success]
        bad = [result for result in results if not result.is_success]
        batch = msgspec.structs.replace(
            stored.batch,
            errors=None,
            request_counts=RequestCounts(counts.total, counts.completed + len(good), counts.failed + len(bad)),
            usage=add_usage(stored.batch.usage, results),
        )
        changed = msgspec.structs.replace(
            stored,
            batch=batch,
            output_bytes=stored.output_bytes + sum(len(result.data) for result in good),
            error_bytes=stored.error_bytes + sum(len(result.data) for result in bad),
            done=done.to_bytes(),
        )
        return changed, done

    def _note_full_disk(self) -> None:
        if self._fault is None:
            logger.error("event=disk_full batch=%s", self._stored.batch.id)
        self.note_fault("disk_full", "The results wait for room on the disk of `data_dir`.")

    def note_fault(self, code: str, message: str) -> None:
        """Say in the batch why it waits; only in memory, since it may be that nothing can be written."""
        self._fault = BatchErrors([BatchError(code=code, message=message)])
