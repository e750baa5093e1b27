"""The process that makes large requests ready for the server (`python -m toka_engine.server.preparing`).

The server starts it, sends it requests and reads what became of them, over pipes. One that takes too much memory, or
does not end, ends this process and nothing else.
"""

from __future__ import annotations

import asyncio
import resource
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO

import msgspec

from toka_engine.portable import count_resident_bytes, end_with_parent, limit_memory_growth, trim_heap
from toka_engine.server.endpoints import chat, completions, messages, responses, tokenize
from toka_engine.server.engine import Engine, load, make_engine
from toka_engine.server.errors import ApiError
from toka_engine.server.failures import frames_of
from toka_engine.server.helpers import LENGTH
from toka_engine.server.large_requests import Prepared, Preparer, Refusal, Setup, Task, encode
from toka_engine.server.preparation import Preparation

_MAX_GROWTH_BYTES = 1 << 30
"""Memory that one request may take."""
_MAX_KEPT_BYTES = 64 << 20
"""Growth of the process beyond which it ends after its answer, to give the memory back."""


class _NobodyLeaves:
    """Stands where the client does: whether that is gone is known to the server."""

    is_gone = False


_PREPARERS: Mapping[str, Preparer[Any]] = {
    preparer.name: preparer
    for preparer in (
        *(completions.PREPARER, chat.PREPARER, messages.PREPARER, messages.COUNT_PREPARER),
        *(responses.PREPARER, responses.COUNT_PREPARER, tokenize.PREPARER),
    )
}


async def prepare(engine: Engine, message: bytes) -> Prepared:
    """Do the task of one message."""
    view = memoryview(message)
    (length,) = LENGTH.unpack_from(view)
    end = LENGTH.size + length
    task = msgspec.msgpack.decode(view[LENGTH.size : end], type=Task)
    preparation = Preparation(engine, _NobodyLeaves(), reports_unknown=task.reports_unknown)
    refusal: Refusal | None = None
    try:
        value = await _PREPARERS[task.preparer].prepare(preparation, bytes(view[end:]), *task.further)
        return Prepared(msgspec.Raw(encode(value)), preparation.ignored)
    except ApiError as error:
        refusal = Refusal(error.status, error.message, error.param, error.code)
    except MemoryError:
        words = "The request takes too much memory to check. Make it smaller."
        refusal = Refusal(400, words, None, "too_complex")
    except Exception as error:
        return Prepared(defect=f"{type(error).__name__}\n{frames_of(error)}")
    return Prepared(ignored=preparation.ignored, refusal=refusal)


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer until the other end is gone or there is a reason to start afresh."""
    setup = msgspec.msgpack.decode(_read(requests), type=Setup)
    engine = make_engine(setup.config, setup.names, setup.info, setup.folders, load(setup.config, setup.folders))
    limit_memory_growth(_MAX_GROWTH_BYTES)
    base = count_resident_bytes()
    _write(answers, b"")
    loop = asyncio.new_event_loop()
    while message := _read(requests):
        prepared = loop.run_until_complete(prepare(engine, message))
        del message
        if count_resident_bytes() > base + _MAX_KEPT_BYTES:
            trim_heap()
            if count_resident_bytes() > base + _MAX_KEPT_BYTES:
                _write(answers, encode(msgspec.structs.replace(prepared, is_last=True)))
                return
        _write(answers, encode(prepared))


def _read(stream: BinaryIO) -> bytes:
    """Return the next message; b"" at the end."""
    head = stream.read(LENGTH.size)
    return stream.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else b""


def _write(stream: BinaryIO, body: bytes) -> None:
    stream.write(LENGTH.pack(len(body)))
    stream.write(body)
    stream.flush()


def run() -> None:
    """Run the process on its standard streams."""
    end_with_parent()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    serve(sys.stdin.buffer, sys.stdout.buffer)
