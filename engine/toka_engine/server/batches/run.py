"""Runs one batch: checks its input, sends its lines through the endpoint's handler, and ends it.

A line is answered at most once in the result files and at least once in all: lines in flight when the process is killed
are run again, because nothing of them was recorded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import sys
import time
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Any, Literal

import msgspec

from toka_engine.config import EngineConfig
from toka_engine.server.batches.database import DatabaseThread
from toka_engine.server.batches.folder import Folder
from toka_engine.server.batches.line_exchange import LineConnection, LineExchange
from toka_engine.server.batches.lines import Numbered, check_lines, decode_line, read_blocks
from toka_engine.server.batches.recording import Recorder
from toka_engine.server.batches.records import BatchErrors, FileObject, RequestCounts, StoredBatch, now
from toka_engine.server.batches.results import LineResult
from toka_engine.server.exchange import Handler
from toka_engine.server.failures import answer_failure
from toka_engine.server.metrics import Metrics
from toka_engine.server.request import MAX_PRIORITY

logger = logging.getLogger("toka.server.batches")

_TRY_AGAIN = (429, 503)
_FIRST_DELAY_S, _MAX_DELAY_S = 0.25, 5.0
StopReason = Literal["drain", "cancel", "expire"]
_REST = {
    "cancel": ("batch_cancelled", "The batch was cancelled before this line was run."),
    "expire": ("batch_expired", "The batch's completion window ended before this line was run."),
}
"""The error of the lines that a stop leaves out."""


class BatchParts(msgspec.Struct, frozen=True):
    """The parts that all runs share."""

    folder: Folder
    database: DatabaseThread
    handlers: Mapping[str, Handler]
    config: EngineConfig
    metrics: Metrics


class BatchRun:
    """A batch that is not over."""

    def __init__(self, stored: StoredBatch, parts: BatchParts) -> None:
        self._parts = parts
        self._recorder = Recorder(stored, parts.folder, parts.database)
        self._stop_reason: StopReason | None = None
        self._stopping = asyncio.Event()
        self._connections: set[LineConnection] = set()
        self._lines: set[asyncio.Task[None]] = set()
        self._fault: BaseException | None = None
        """The first defect that ended a line without an answer."""

    @property
    def stored(self) -> StoredBatch:
        return self._recorder.stored

    def stop(self, reason: StopReason) -> None:
        """Begin no further line. Lines in flight are given up, except for a drain, which waits for them."""
        if self._stop_reason in (None, "drain"):
            self._stop_reason = reason
        self._stopping.set()
        if reason != "drain":
            self.give_up_lines()

    def note_fault(self, message: str) -> None:
        """Say in the batch that it has stopped until the engine's next start."""
        self._recorder.note_fault("stopped", f"The batch goes on when the engine is started again: {message}")

    def give_up_lines(self) -> None:
        for connection in tuple(self._connections):
            connection.lose()

    async def cancel(self) -> None:
        """Note that the batch is to end, then stop it. Raises OSError where the disk has no room for the note. A batch
        whose end is being stored stays as it is.
        """
        await self._recorder.update(partial(_move, status="cancelling", cancelling_at=now()))
        self.stop("cancel")

    async def run(self, window: asyncio.Semaphore) -> None:
        """Run to the batch's end, or to a drain's. Raises OSError and sqlite3.Error where the disk fails.

        `window`: the lines that may be in flight at once, over all batches.
        """
        if self.stored.batch.in_progress_at is None and not await self._check():
            return
        await self._recorder.open()
        recording = asyncio.create_task(self._recorder.run())
        try:
            if self.stored.batch.status == "cancelling":
                self.stop("cancel")
            await self._answer_lines(recording, window)
            if self._stop_reason in _REST:
                await self._fill_rest(*_REST[self._stop_reason])
            if self._stop_reason != "drain":
                await self._recorder.settle()
                await self._finish()
        finally:
            await self._recorder.end(recording)

    # ------------------------------------------------------------ the beginning

    async def _check(self) -> bool:
        parts, batch = self._parts, self.stored.batch
        config = parts.config
        check = partial(check_lines, max_lines=config.max_batch_lines, max_line_bytes=config.max_body_bytes)
        findings = await asyncio.to_thread(check, parts.folder.path_of(batch.input_file_id), batch.endpoint)
        if findings.errors:
            faults = BatchErrors(findings.errors)
            failed = partial(_move, status="failed", failed_at=now(), errors=faults)
            await self._recorder.update(failed, waits_for_room=True)
            logger.info("event=batch_failed batch=%s errors=%d", batch.id, len(findings.errors))
            return False
        counts = RequestCounts(findings.num_lines)

        def begin(stored: StoredBatch) -> StoredBatch:
            status = "cancelling" if stored.batch.status == "cancelling" else "in_progress"
            return _move(stored, status=status, in_progress_at=now(), request_counts=counts, model=findings.model)

        await self._recorder.update(begin, waits_for_room=True)
        logger.info("event=batch_started batch=%s lines=%d", batch.id, findings.num_lines)
        return True

    # ------------------------------------------------------------ the lines

    async def _answer_lines(self, recording: asyncio.Task[None], window: asyncio.Semaphore) -> None:
        feeding = asyncio.create_task(self._feed(window))
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({feeding, stopping, recording}, return_when=asyncio.FIRST_COMPLETED)
            if recording.done():
                recording.result()
        finally:
            stopping.cancel()
            feeding.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await feeding
        while self._lines:
            await asyncio.wait({*self._lines, recording}, return_when=asyncio.FIRST_COMPLETED)
            if recording.done():
                recording.result()
        if self._fault is not None:
            raise self._fault

    async def _feed(self, window: asyncio.Semaphore) -> None:
        """Begin lines as the window allows."""
        async for line in self._undone_lines():
            await window.acquire()
            task = asyncio.create_task(self._answer_line(line))
            self._lines.add(task)
            task.add_done_callback(lambda task: self._on_line_over(task, window))

    def _on_line_over(self, task: asyncio.Task[None], window: asyncio.Semaphore) -> None:
        self._lines.discard(task)
        window.release()
        if not task.cancelled() and (fault := task.exception()):
            self._fault = self._fault or fault
            self._stopping.set()

    async def _undone_lines(self) -> AsyncIterator[Numbered]:
        path = self._parts.folder.path_of(self.stored.batch.input_file_id)
        blocks = read_blocks(path, sys.maxsize)  # checked, perhaps by an engine whose `max_body_bytes` was larger
        while block := await asyncio.to_thread(next, blocks, None):
            for line in block:
                if line.number not in self._recorder.done:
                    yield line

    async def _answer_line(self, line: Numbered) -> None:
        request = decode_line(line.data)
        delay_s = _FIRST_DELAY_S
        started_s = time.monotonic()
        while True:
            exchange = await self._ask(request.url, bytes(request.body), started_s)
            if exchange.connection.is_gone:
                return
            if exchange.status not in _TRY_AGAIN:
                break
            if self._stopping.is_set():
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay_s)
            delay_s = min(2 * delay_s, _MAX_DELAY_S)
        answer = {
            "status_code": exchange.status,
            "request_id": exchange.request_id.decode(),
            "body": msgspec.Raw(exchange.body),
        }
        result = LineResult(
            number=line.number,
            is_success=exchange.status == 200,
            data=_result_line(request.custom_id, answer, None),
            usage=exchange.usage,
        )
        await self._recorder.add(result)

    async def _ask(self, url: str, body: bytes, started_s: float) -> LineExchange:
        """Return the answered line; its `timeout_s` began at `started_s`, with the first of its attempts."""
        connection = LineConnection()
        if self._stop_reason in _REST:
            connection.lose()
        self._connections.add(connection)
        exchange = LineExchange(url, body, connection, self.stored.owner, MAX_PRIORITY)
        exchange.started_s = started_s
        try:
            if not connection.is_gone:
                await self._parts.handlers[url](exchange)
        except Exception as error:  # the outermost point of one request, as in `front`
            await answer_failure(exchange, error, self._parts.metrics)
        finally:
            self._connections.discard(connection)
        return exchange

    # ------------------------------------------------------------ the end

    async def _fill_rest(self, code: str, message: str) -> None:
        """Write an error for each line that will not be run: each line of the input has its line of output."""
        await self._recorder.settle()
        async for line in self._undone_lines():
            error = {"code": code, "message": message}
            data = _result_line(decode_line(line.data).custom_id, None, error)
            await self._recorder.add(LineResult(number=line.number, is_success=False, data=data))

    async def _finish(self) -> None:
        stored, at = self.stored, now()
        results = []
        shown: dict[str, str] = {}
        kinds = (("output", stored.output_id, stored.output_bytes), ("error", stored.error_id, stored.error_bytes))
        for kind, file_id, size in kinds:
            if not size:
                continue
            shown[f"{kind}_file_id"] = file_id
            results.append(
                FileObject(
                    id=file_id,
                    bytes=size,
                    created_at=at,
                    filename=f"{stored.batch.id}_{kind}.jsonl",
                    purpose="batch_output",
                    expires_at=at + stored.results_expire_s if stored.results_expire_s else None,
                )
            )
        ends: dict[str | None, dict[str, Any]] = {
            None: {"status": "completed", "completed_at": at},
            "cancel": {"status": "cancelled", "cancelled_at": at},
            "expire": {"status": "expired", "expired_at": at},
        }
        changes = {"finalizing_at": at, "errors": None, **ends[self._stop_reason], **shown}
        await self._recorder.finish(lambda stored: _move(stored, **changes), results)
        ended = self.stored
        counts = ended.batch.request_counts
        logger.info(
            "event=batch_over batch=%s status=%s completed=%d failed=%d",
            ended.batch.id,
            ended.batch.status,
            counts.completed,
            counts.failed,
        )


def _move(stored: StoredBatch, **changes: Any) -> StoredBatch:
    return msgspec.structs.replace(stored, batch=msgspec.structs.replace(stored.batch, **changes))


def _result_line(custom_id: str, response: dict[str, Any] | None, error: dict[str, str] | None) -> bytes:
    line = {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": custom_id, "response": response, "error": error}
    return msgspec.json.encode(line) + b"\n"
