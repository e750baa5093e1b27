"""`/v1/files`: uploads, lists, contents and deletions of stored files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import msgspec

from toka_engine.server.batches.cursor import Cursor, begin_of
from toka_engine.server.batches.database import Database
from toka_engine.server.batches.records import DeletedFile, FileList, FileObject, new_file_id, now
from toka_engine.server.batches.service import Batches, Opened
from toka_engine.server.batches.uploads import Upload
from toka_engine.server.errors import ApiError, invalid, no_room
from toka_engine.server.exchange import Exchange
from toka_engine.server.keys.check import owner_of
from toka_engine.server.paging import Page, read_page

PATH = "/v1/files"
_PURPOSES = ("batch", "user_data")
_DEFAULT_LIFE_S = 30 * 86400
_MIN_LIFE_S, _MAX_LIFE_S = 3600, 30 * 86400
_PROGRESS_BYTES = 64 * 1024
_MAX_LISTED = 10_000


async def upload_file(exchange: Exchange, batches: Batches) -> FileObject:
    """Store an upload. Raises ApiError and ClientGoneError, after which nothing is left of it."""
    opened, config = batches.opened(), batches.config
    owner = owner_of(exchange)
    await _check_share(owner, batches, opened)
    declared = exchange.header(b"content-length") or b""
    expected = int(declared) if declared.isdigit() else 0
    if opened.folder.free_bytes() - expected < config.min_free_disk_bytes:
        raise no_room("The disk of `data_dir` has too little room (`min_free_disk_bytes`).")
    file_id = new_file_id(batches.ordinal)
    upload = Upload(exchange.header(b"content-type") or b"", opened.folder.part_of(file_id), config.max_file_bytes)
    try:
        async with asyncio.timeout(config.upload_timeout_s):
            await upload.receive(exchange.read_parts(_PROGRESS_BYTES))
        file = _describe(file_id, upload)
        await _check_share(owner, batches, opened, file.bytes)
        await asyncio.to_thread(opened.folder.complete, file_id)
        await opened.database.run(Database.add_file, owner, file)
    except TimeoutError as error:
        await asyncio.to_thread(opened.folder.remove, file_id)
        message = f"The upload did not arrive within {config.upload_timeout_s:g} s (`upload_timeout_s`)."
        raise ApiError(408, message, code="upload_timeout") from error
    except BaseException:
        await asyncio.to_thread(opened.folder.remove, file_id)
        raise
    return file


async def _check_share(owner: str, batches: Batches, opened: Opened, more: int = 0) -> None:
    number, size = await opened.database.run(Database.measure_files, owner)
    config = batches.config
    if number >= config.max_stored_files:
        raise no_room(f"There are {number} files already (`max_stored_files`): delete some.")
    if size + more > config.max_stored_bytes:
        raise no_room(f"The files would have {size + more} bytes (`max_stored_bytes`): delete some.")


def _describe(file_id: str, upload: Upload) -> FileObject:
    """Return the file of a complete upload. Raises a 400 that names the field."""
    fields = upload.fields
    if "purpose" not in fields:
        raise invalid("purpose", "Missing required field: 'purpose'.", "missing_required_parameter")
    if fields["purpose"] not in _PURPOSES:
        raise invalid("purpose", f"'purpose' must be one of: {', '.join(_PURPOSES)}.", "invalid_value")
    at = now()
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    life_s = _DEFAULT_LIFE_S
    if anchor is not None or seconds is not None:
        if anchor != "created_at":
            raise invalid("expires_after[anchor]", "'expires_after[anchor]' must be 'created_at'.", "invalid_value")
        if seconds is None or not seconds.isascii() or not seconds.isdigit() or len(seconds) > 9:
            raise invalid("expires_after[seconds]", "'expires_after[seconds]' must be an integer.", "invalid_type")
        life_s = check_life(int(seconds), "expires_after[seconds]")
    return FileObject(
        id=file_id,
        bytes=upload.num_bytes,
        created_at=at,
        filename=upload.filename or "file",
        purpose=fields["purpose"],
        expires_at=at + life_s,
    )


def check_life(seconds: int, name: str) -> int:
    """Return the seconds for which a file is kept. Raises a 400 that names the field."""
    if not _MIN_LIFE_S <= seconds <= _MAX_LIFE_S:
        raise invalid(name, f"'{name}' must be from {_MIN_LIFE_S} to {_MAX_LIFE_S}.", "invalid_value")
    return seconds


def read_file_page(query: Mapping[str, str]) -> Page:
    """Return the page of files that is asked for: the newest first unless `order=asc`. Raises a 400."""
    return read_page(query, _MAX_LISTED, _MAX_LISTED, others=("purpose",))


async def list_files(
    exchange: Exchange, page: Page, purpose: str | None, batches: Batches, cursor: Cursor | None = None
) -> FileList:
    """Return one page of the caller's files. `cursor`: where it begins, if that is another replica's file."""
    opened, owner = batches.opened(), owner_of(exchange)
    after = begin_of(page.after, cursor, batches.ordinal, is_ascending=page.is_ascending)
    if isinstance(after, str) and await opened.database.run(Database.find_file, owner, after) is None:
        raise no_file(after, "after")
    found = await opened.database.run(
        Database.list_files,
        owner,
        after=after,
        limit=page.limit + 1,
        is_ascending=page.is_ascending,
        purpose=purpose,
    )
    return _one_page(found, page)


def _one_page(found: list[FileObject], page: Page) -> FileList:
    shown = found[: page.limit]
    return FileList(
        data=shown,
        first_id=shown[0].id if shown else None,
        last_id=shown[-1].id if shown else None,
        has_more=len(found) > page.limit,
    )


async def find_file(exchange: Exchange, file_id: str, batches: Batches) -> FileObject:
    """Return one of the caller's files. Raises a 404."""
    file = await batches.opened().database.run(Database.find_file, owner_of(exchange), file_id)
    if file is None:
        raise no_file(file_id)
    return file


async def delete_file(exchange: Exchange, file_id: str, batches: Batches) -> DeletedFile:
    """Delete one of the caller's files. Raises a 404, and a 409 while a batch reads it."""
    await find_file(exchange, file_id, batches)
    if not await batches.remove_file(file_id):
        raise ApiError(409, "A batch that is not over reads this file.", code="file_in_use")
    return DeletedFile(id=file_id)


class Content(msgspec.Struct, frozen=True):
    """The bytes of a file, as they are sent."""

    path: Path
    num_bytes: int
    headers: dict[str, str]


async def find_content(exchange: Exchange, file_id: str, batches: Batches) -> Content:
    """Return where a file's bytes are. Its name goes into a header, in a form that no client can break."""
    file = await find_file(exchange, file_id, batches)
    name = "".join(char if char.isascii() and (char.isalnum() or char in "._- ") else "_" for char in file.filename)
    headers = {
        "content-disposition": f'attachment; filename="{name}"',
        "x-content-type-options": "nosniff",
        "content-length": str(file.bytes),
    }
    return Content(batches.opened().folder.path_of(file_id), file.bytes, headers)


async def read_content(content: Content) -> AsyncIterator[bytes]:
    """Yield a file's bytes. What a deletion removes meanwhile is still sent to the end."""
    file = await asyncio.to_thread(content.path.open, "rb")
    try:
        left = content.num_bytes
        while left and (data := await asyncio.to_thread(file.read, min(left, 256 * 1024))):
            left -= len(data)
            yield data
    finally:
        file.close()


def no_file(file_id: str, param: str = "file_id") -> ApiError:
    """Return the 404 of a file that does not exist, or is somebody else's."""
    return ApiError(404, f"There is no file '{file_id[:100]}'.", param=param, code="file_not_found")
