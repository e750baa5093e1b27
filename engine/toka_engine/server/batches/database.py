"""The SQLite database of files and batches, in one thread of its own.

A call is one transaction, synced to the disk before it returns: what an answer states survives a power cut. The file is
locked by this connection for as long as the process lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Concatenate, Literal, ParamSpec, TypeVar

import msgspec

from toka_engine.server.batches.records import FileObject, StoredBatch

Bound = tuple[Literal["<", "<=", ">", ">="], int]
"""A comparison with a time that the age of a row must hold."""
P = ParamSpec("P")
T = TypeVar("T")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
  id TEXT PRIMARY KEY, owner TEXT NOT NULL, created_at INTEGER NOT NULL, bytes INTEGER NOT NULL,
  purpose TEXT NOT NULL, expires_at INTEGER, record BLOB NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS files_by_owner ON files (owner, created_at, id);
CREATE TABLE IF NOT EXISTS batches (
  id TEXT PRIMARY KEY, owner TEXT NOT NULL, created_at INTEGER NOT NULL, is_over INTEGER NOT NULL,
  input_file_id TEXT NOT NULL, record BLOB NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS batches_by_owner ON batches (owner, created_at, id);
PRAGMA user_version = 1;
"""
_VERSION = 1
_encode = msgspec.msgpack.encode
_decode_file = msgspec.msgpack.Decoder(FileObject).decode
_decode_batch = msgspec.msgpack.Decoder(StoredBatch).decode


class Database:
    """The tables. Its methods block; `DatabaseThread` calls them in its thread alone."""

    def __init__(self, path: Path) -> None:
        """Open `path`, or make it. Raises sqlite3.DatabaseError where it is damaged or of a later version."""
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            self._prepare()
        except BaseException:
            self._connection.close()
            raise

    def _prepare(self) -> None:
        execute = self._connection.execute
        execute("PRAGMA locking_mode = EXCLUSIVE")
        execute("PRAGMA journal_mode = WAL")
        execute("PRAGMA synchronous = FULL")
        (fault,) = execute("PRAGMA quick_check(1)").fetchone()
        if fault != "ok":
            raise sqlite3.DatabaseError(fault)
        (version,) = execute("PRAGMA user_version").fetchone()
        if version > _VERSION:
            raise sqlite3.DatabaseError(f"it was written by a later version of the engine (schema {version})")
        if version < _VERSION:  # a start on a full disk writes nothing else
            self._connection.executescript(_SCHEMA)

    def close(self) -> None:
        self._connection.close()

    # ------------------------------------------------------------ files

    def add_file(self, owner: str, file: FileObject) -> None:
        row = (file.id, owner, file.created_at, file.bytes, file.purpose, file.expires_at, _encode(file))
        self._connection.execute("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def find_file(self, owner: str, file_id: str) -> FileObject | None:
        found = self._connection.execute("SELECT record FROM files WHERE id = ? AND owner = ?", (file_id, owner))
        row = found.fetchone()
        return _decode_file(row[0]) if row else None

    def list_files(
        self, owner: str, *, after: str | Bound | None, limit: int, is_ascending: bool, purpose: str | None
    ) -> list[FileObject]:
        """Return up to `limit` files of one owner by age, behind the file `after`."""
        clauses: list[str] = ["owner = ?"]
        values: list[str | int] = [owner]
        if purpose is not None:
            clauses.append("purpose = ?")
            values.append(purpose)
        rows = self._page("files", clauses, values, after, limit, is_ascending=is_ascending)
        return [_decode_file(record) for record in rows]

    def measure_files(self, owner: str) -> tuple[int, int]:
        """Return how many files an owner has, and their bytes."""
        query = "SELECT COUNT(*), COALESCE(SUM(bytes), 0) FROM files WHERE owner = ?"
        number, size = self._connection.execute(query, (owner,)).fetchone()
        return number, size

    def remove_file(self, file_id: str) -> bool:
        """Forget a file unless a batch that is not over reads it; tell whether it is forgotten."""
        query = "SELECT 1 FROM batches WHERE input_file_id = ? AND NOT is_over LIMIT 1"
        if self._connection.execute(query, (file_id,)).fetchone() is not None:
            return False
        self._connection.execute("DELETE FROM files WHERE id = ?", (file_id,))
        return True

    def find_expired_files(self, now_s: int) -> list[str]:
        """Return the files whose time is over and that no running batch reads."""
        query = """SELECT id FROM files WHERE expires_at <= ?
            AND id NOT IN (SELECT input_file_id FROM batches WHERE NOT is_over)"""
        return [file_id for (file_id,) in self._connection.execute(query, (now_s,))]

    def list_file_ids(self) -> set[str]:
        """Return the ids of all files on disk that belong to a row: stored ones, and results of running batches."""
        ids = {file_id for (file_id,) in self._connection.execute("SELECT id FROM files")}
        for stored in self.list_unfinished():
            ids |= {stored.output_id, stored.error_id}
        return ids

    # ------------------------------------------------------------ batches

    def add_batch(self, stored: StoredBatch) -> bool:
        """Add a batch, whose input nobody can delete from then on; False where the input is gone already."""
        batch = stored.batch
        if self.find_file(stored.owner, batch.input_file_id) is None:
            return False
        row = (batch.id, stored.owner, batch.created_at, stored.is_over, batch.input_file_id, _encode(stored))
        self._connection.execute("INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?)", row)
        return True

    def update_batch(self, stored: StoredBatch) -> None:
        row = (stored.is_over, _encode(stored), stored.batch.id)
        self._connection.execute("UPDATE batches SET is_over = ?, record = ? WHERE id = ?", row)

    def finish_batch(self, stored: StoredBatch, results: list[FileObject]) -> None:
        """Store the end of a batch together with its result files: there is never one without the other."""
        self._connection.execute("BEGIN")
        with self._connection:
            for file in results:
                self.add_file(stored.owner, file)
            self.update_batch(stored)

    def find_batch(self, owner: str, batch_id: str) -> StoredBatch | None:
        found = self._connection.execute("SELECT record FROM batches WHERE id = ? AND owner = ?", (batch_id, owner))
        row = found.fetchone()
        return _decode_batch(row[0]) if row else None

    def list_batches(self, owner: str, *, after: str | Bound | None, limit: int) -> list[StoredBatch]:
        """Return up to `limit` batches of one owner, the newest first, behind the batch `after`."""
        rows = self._page("batches", ["owner = ?"], [owner], after, limit, is_ascending=False)
        return [_decode_batch(record) for record in rows]

    def list_unfinished(self) -> list[StoredBatch]:
        rows = self._connection.execute("SELECT record FROM batches WHERE NOT is_over ORDER BY created_at, rowid")
        return [_decode_batch(record) for (record,) in rows]

    def _page(
        self,
        table: str,
        clauses: list[str],
        values: list[str | int],
        after: str | Bound | None,
        limit: int,
        *,
        is_ascending: bool,
    ) -> list[bytes]:
        sign, order = (">", "ASC") if is_ascending else ("<", "DESC")
        if isinstance(after, tuple):
            clauses = [*clauses, f"created_at {after[0]} ?"]
            values = [*values, after[1]]
        elif after is not None:
            clauses = [*clauses, f"(created_at, rowid) {sign} (SELECT created_at, rowid FROM {table} WHERE id = ?)"]
            values = [*values, after]
        query = f"""SELECT record FROM {table} WHERE {" AND ".join(clauses)}
            ORDER BY created_at {order}, rowid {order} LIMIT ?"""
        return [record for (record,) in self._connection.execute(query, (*values, limit))]


class DatabaseThread:
    """Calls a database's methods in one thread, in order."""

    def __init__(self, database: Database, executor: ThreadPoolExecutor) -> None:
        self._database = database
        self._executor = executor

    @classmethod
    async def open(cls, path: Path) -> DatabaseThread:
        """Return the open database. Raises sqlite3.DatabaseError, and an OSError with ENOSPC where the disk is full."""
        executor = ThreadPoolExecutor(1, "database")
        loop = asyncio.get_running_loop()
        try:
            with _full_disk_as_os_error():
                return cls(await loop.run_in_executor(executor, Database, path), executor)
        except BaseException:
            executor.shutdown(wait=False)
            raise

    async def run(self, method: Callable[Concatenate[Database, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `method` of the database, as `run(Database.find_file, owner, file_id)`.

        Raises what it raises, and an OSError with ENOSPC where the disk is full. A caller that is cancelled does not
        know whether the call has been made.
        """
        loop = asyncio.get_running_loop()
        with _full_disk_as_os_error():
            return await loop.run_in_executor(self._executor, partial(method, self._database, *args, **kwargs))

    async def close(self) -> None:
        await self.run(Database.close)
        self._executor.shutdown()


@contextlib.contextmanager
def _full_disk_as_os_error() -> Iterator[None]:
    """Raise what SQLite says of a full disk as files do."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
            raise
        raise OSError(errno.ENOSPC, str(error)) from error
