"""The server drops what other threads hand to its loop once that is closed, and not before."""

from __future__ import annotations

import asyncio
import threading

import pytest
from toka_engine.server.process import call_from_thread


def test_a_message_that_comes_when_the_server_has_ended_is_dropped() -> None:
    loop, called = asyncio.new_event_loop(), threading.Event()
    thread = threading.Thread(target=call_from_thread, args=(loop, called.set))
    thread.start()
    thread.join()
    loop.run_until_complete(asyncio.sleep(0))
    assert called.is_set()
    loop.close()
    call_from_thread(loop, lambda: pytest.fail("it is called in a closed loop"))
