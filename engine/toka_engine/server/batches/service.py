"""The files and batches of this engine: their folder, the batches that run, and what is swept.

Owns: the life of the data folder, from the wait for its lock to the drain. The endpoints' answers come from here.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Mapping
from pathlib import Path

import msgspec

from toka_engine.config import EngineConfig
from toka_engine.server.batches.database import Database, DatabaseThread
from toka_engine.server.batches.folder import Folder
from toka_engine.server.batches.peers import Peers
from toka_engine.server.batches.records import StoredBatch, now
from toka_engine.server.batches.run import BatchParts, BatchRun
from toka_engine.server.errors import ApiError, is_full, unavailable
from toka_engine.server.exchange import Handler
from toka_engine.server.failures import frames_of
from toka_engine.server.metrics import Metrics

logger = logging.getLogger("toka.server.batches")

_OPEN_RETRY_S = 2.0
_SWEEP_S = 60.0
_MAX_WINDOW = 1024


class Opened(msgspec.Struct, frozen=True):
    """The folder and its database, once they are ours."""

    folder: Folder
    database: DatabaseThread


class Batches:
    """Files and batches, or the reason why there are none."""

    def __init__(
        self, config: EngineConfig, handlers: Mapping[str, Handler], metrics: Metrics, peers: Peers | None = None
    ) -> None:
        self.config = config
        self.peers = peers
        """The other replicas that keep files and batches; None if there are none."""
        self.handlers = handlers
        """The endpoints that a batch's lines may be for, by path."""
        self._metrics = metrics
        self._opened: Opened | None = None
        self._reason = "The files of `data_dir` are not open yet."
        self._window: asyncio.Semaphore | None = None
        self._runs: dict[str, BatchRun] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = asyncio.Event()

    def opened(self) -> Opened:
        """Return the folder and the database. Raises 501 without `data_dir`, and 503 while they are not open."""
        if self.config.data_dir is None:
            message = "This server keeps no files and batches: its key `data_dir` is not set."
            raise ApiError(501, message, code="data_dir_not_set")
        if self._opened is None:
            raise unavailable(self._reason)
        return self._opened

    @property
    def is_open(self) -> bool:
        return self._opened is not None

    @property
    def ordinal(self) -> int | None:
        """The ordinal that new ids carry; None without peers."""
        return self.peers.ordinal if self.peers else None

    # ------------------------------------------------------------ life

    async def run(self) -> None:
        """Open the folder once it is free, then sweep it from time to time, until the drain. A folder that cannot be
        used is told in the log and in every answer; completions and chat go on.
        """
        if self.config.data_dir is None:
            return
        try:
            await self._open(Path(self.config.data_dir))
        except (OSError, sqlite3.Error) as error:
            self._reason = f"The folder of `data_dir` cannot be used: {error}."
            logger.error("event=data_dir_unusable reason=%r", str(error))
            return
        while not self._draining.is_set():
            try:
                await self._sweep()
            except (OSError, sqlite3.Error) as error:  # a full disk, say: what is not removed now is removed later
                logger.warning("event=sweep_failed reason=%r", str(error))
            await self._wait_for_drain(_SWEEP_S)

    async def _open(self, root: Path) -> None:
        while (folder := await asyncio.to_thread(Folder.take, root)) is None:
            self._reason = "Another engine has the folder of `data_dir`."
            logger.warning("event=data_dir_taken path=%s", root)
            await self._wait_for_drain(_OPEN_RETRY_S)
            if self._draining.is_set():
                return
        while not self._draining.is_set():
            try:
                await self._read(folder)
                return
            except OSError as error:
                if not is_full(error):
                    raise
            self._reason = "The disk of `data_dir` is full."
            logger.error("event=data_dir_full path=%s", root)
            await self._wait_for_drain(_OPEN_RETRY_S)

    async def _read(self, folder: Folder) -> None:
        """Open the database and go on with what is not over. Raises OSError and sqlite3.Error."""
        await asyncio.to_thread(folder.check_database)
        database = await DatabaseThread.open(folder.database)
        try:
            num_strays = await asyncio.to_thread(folder.sweep, await database.run(Database.list_file_ids))
            unfinished = await database.run(Database.list_unfinished)
        except BaseException:
            await database.close()
            raise
        logger.info("event=data_dir_open unfinished_batches=%d stray_files=%d", len(unfinished), num_strays)
        self._opened = Opened(folder, database)
        for stored in unfinished:
            self.start(stored)

    async def _wait_for_drain(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._draining.wait(), seconds)
        except TimeoutError:
            return

    def begin_serving(self, max_streams: int) -> None:
        """Run batches from now on: the engine takes requests."""
        self._window = asyncio.Semaphore(max(1, min(_MAX_WINDOW, 2 * max_streams)))
        for run in self._runs.values():
            self._begin(run)

    def stop_feeding(self) -> None:
        """Begin no further line: the engine drains. Lines in flight are answered."""
        self._draining.set()
        for run in self._runs.values():
            run.stop("drain")

    async def wait_idle(self) -> None:
        """Return when the lines in flight are answered and recorded."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """Give up what is in flight, record what is answered, and let the folder go."""
        self.stop_feeding()
        for run in self._runs.values():
            run.give_up_lines()
        for task in self._tasks:
            task.cancel()
        await self.wait_idle()
        if self._opened is not None:
            opened, self._opened = self._opened, None
            await opened.database.close()
            opened.folder.release()
        if self.peers is not None:
            await self.peers.close()

    # ------------------------------------------------------------ batches

    def start(self, stored: StoredBatch) -> None:
        """Take a batch, which runs as soon as the engine serves."""
        opened = self.opened()
        parts = BatchParts(opened.folder, opened.database, self.handlers, self.config, self._metrics)
        run = self._runs[stored.batch.id] = BatchRun(stored, parts)
        if self._window is not None and not self._draining.is_set():
            self._begin(run)

    def find_run(self, owner: str, batch_id: str) -> BatchRun | None:
        """Return a batch that is not over, if it is the owner's."""
        run = self._runs.get(batch_id)
        return run if run is not None and run.stored.owner == owner else None

    async def find_age(self, owner: str, stored_id: str) -> int | None:
        """Return when one of the owner's files or batches was made; None if it is not here."""
        database = self.opened().database
        if stored_id.startswith("file-"):
            file = await database.run(Database.find_file, owner, stored_id)
            return file.created_at if file else None
        stored = await database.run(Database.find_batch, owner, stored_id)
        return stored.batch.created_at if stored else None

    def _begin(self, run: BatchRun) -> None:
        task = asyncio.create_task(self._watch(run))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch(self, run: BatchRun) -> None:
        """Run a batch to its end. One that cannot go on, because its disk fails or by a defect of ours, says so and
        stays as it is for the next start.
        """
        if self._window is None:
            raise AssertionError("a batch runs before the engine serves")
        batch_id = run.stored.batch.id
        expiry = None
        if (expires_at := run.stored.batch.expires_at) is not None:
            delay_s = max(0, expires_at - now())
            expiry = asyncio.get_running_loop().call_later(delay_s, run.stop, "expire")
        try:
            await run.run(self._window)
        except (OSError, sqlite3.Error) as error:
            logger.error("event=batch_stopped batch=%s reason=%r", batch_id, str(error))
            run.note_fault(f"its files cannot be used ({error}).")
        except Exception as error:  # the outermost point of one batch: a defect of ours ends no other
            logger.error("event=batch_stopped batch=%s error=%s\n%s", batch_id, type(error).__name__, frames_of(error))
            run.note_fault("the server failed on it; its log says why.")
        finally:
            if expiry is not None:
                expiry.cancel()
        if run.stored.is_over:
            self._runs.pop(batch_id, None)

    async def _sweep(self) -> None:
        """Remove the files whose time is over."""
        opened = self.opened()
        for file_id in await opened.database.run(Database.find_expired_files, now()):
            if await self.remove_file(file_id):
                logger.info("event=file_expired file=%s", file_id)

    async def remove_file(self, file_id: str) -> bool:
        """Remove a file unless a batch that is not over reads it; tell whether it is removed.

        Its row goes first, so that a crash leaves bytes, which the next start sweeps, and no ghost. On a full disk its
        bytes go first: the database needs room even to forget.
        """
        opened = self.opened()
        try:
            is_removed = await opened.database.run(Database.remove_file, file_id)
        except OSError as error:
            if not is_full(error):
                raise
            await asyncio.to_thread(opened.folder.remove, file_id)
            return await opened.database.run(Database.remove_file, file_id)
        if is_removed:
            await asyncio.to_thread(opened.folder.remove, file_id)
        return is_removed
