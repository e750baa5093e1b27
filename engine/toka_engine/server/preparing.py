"""`python -m toka_engine.server.preparing`: the process that makes large requests ready for the server.

The server starts it, sends it requests and reads what became of them, over pipes. One that takes too much memory, or
does not end, ends this process and nothing else.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import resource
import sys
import traceback
from typing import BinaryIO

from toka_engine.portable import count_resident_bytes, end_with_parent, limit_memory_growth, trim_heap
from toka_engine.server.engine import Engine, load, make_engine
from toka_engine.server.errors import ApiError, invalid
from toka_engine.server.helpers import LENGTH
from toka_engine.server.large_requests import Prepared, Setup, Task
from toka_engine.server.preparation import Preparation

_MAX_GROWTH_BYTES = 1 << 30
"""Memory that one request may take."""
_MAX_KEPT_BYTES = 64 << 20
"""Growth of the process beyond which it ends after its answer, to give the memory back."""
_NICENESS = 5
"""This process stands back by so much where the CPU is short: others wait for tokens. It must not starve either."""


class _NobodyLeaves:
    """Stands where the client does: whether that is gone is known to the server."""

    is_gone = False


async def prepare(engine: Engine, message: bytes) -> Prepared:
    """Do the task of one message."""
    view = memoryview(message)
    (length,) = LENGTH.unpack_from(view)
    end = LENGTH.size + length
    task: Task = pickle.loads(view[LENGTH.size : end])
    preparation = Preparation(engine, _NobodyLeaves(), reports_unknown=task.reports_unknown)
    try:
        value = await task.prepare(preparation, bytes(view[end:]), *task.further)
    except ApiError as error:
        rest = {"param": error.param, "code": error.code, "headers": error.headers}
        return Prepared(None, preparation.ignored, (error.status, error.message, rest))
    except MemoryError:
        refused = invalid(None, "The request takes too much memory to check. Make it smaller.", "too_complex")
        return Prepared(None, [], (refused.status, refused.message, {"code": refused.code}))
    except Exception:
        return Prepared(None, [], defect=traceback.format_exc())
    return Prepared(value, preparation.ignored)


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer until the other end is gone or there is a reason to start afresh."""
    setup: Setup = pickle.loads(_read(requests))
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
                _write(answers, pickle.dumps(prepared._replace(is_last=True)))
                return
        _write(answers, pickle.dumps(prepared))


def _read(stream: BinaryIO) -> bytes:
    """Return the next message; b"" at the end."""
    head = stream.read(LENGTH.size)
    return stream.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else b""


def _write(stream: BinaryIO, body: bytes) -> None:
    stream.write(LENGTH.pack(len(body)))
    stream.write(body)
    stream.flush()


if __name__ == "__main__":
    end_with_parent()
    os.nice(_NICENESS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    serve(sys.stdin.buffer, sys.stdout.buffer)
