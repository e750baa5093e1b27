"""The three stand-ins share this: they say `ready`, then do what TOKA_TEST_<ROLE> tells them.

ready (default): wait for ever. hold: never become ready. memory, crash: end with an error of ours, with a defect.
busy: one turn that never ends. peer: end when the other end of the last link is gone. orphan: leave a process behind.
late, deserter: on SIGUSR1 close the last link, and after the other end has gone be killed, or live on.
hog: compute for minutes without giving up Python's lock.
deaf, slow: hold Python's lock before being ready, so that no thread answers, for ever or for a while.
ahead, in_step: be in the first step, which the others are in, too, or have not begun. done: have ended it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import threading

from toka_engine.channel import Channel
from toka_engine.child import Child
from toka_engine.errors import OutOfMemoryError
from toka_engine.messages import Stop

log = logging.getLogger(__name__)


def behave(child: Child, link_fds: list[int]) -> None:
    num_links = len(sys.argv) - 2  # the first one is the control link
    behaviour = os.environ.get(f"TOKA_TEST_{child.name.upper()}", "ready")
    child.progress("load", "weights")
    log.info("event=given process=%s seed=%s links=%d", child.name, child.start.config.seed, num_links)
    if behaviour == "memory":
        raise OutOfMemoryError(f"{child.name}: 1 GB short")
    if behaviour == "crash":
        raise RuntimeError("a defect")
    if behaviour == "orphan":
        # The shell ends at once; what it left in the background has no parent then.
        pid = subprocess.run(["sh", "-c", "true & echo $!"], capture_output=True, text=True, check=True).stdout
        log.info("event=orphan pid=%s", pid.strip())
    if behaviour in ("deaf", "slow"):
        threading.Event().wait(1.0)  # until it has answered once
        log.info("event=deaf")
        library = ctypes.PyDLL(None)  # whose calls keep the lock
        library.sleep(4 if behaviour == "slow" else 3600)
    is_time = threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: is_time.set())
    if behaviour != "hold":
        child.ready(os.environ.get("TOKA_TEST_DEVICE", ""))
    if behaviour in ("ahead", "in_step", "done"):
        child.begin_step()
    if behaviour == "done":
        child.end_step()
    if behaviour == "peer":
        Channel[Stop].from_fd(link_fds[-1], Stop).receive()
    if behaviour == "hog":
        pow(3, 4 * 10**8)
    if behaviour in ("late", "deserter"):
        link = socket.socket(fileno=link_fds[-1])
        is_time.wait()
        link.shutdown(socket.SHUT_WR)
        link.recv(1)
        if behaviour == "late":
            os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "busy":
        with child.busy():
            threading.Event().wait()
    threading.Event().wait()
