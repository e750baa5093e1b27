"""The part that all child processes of the supervisor share: control link, heartbeat, exit message.

A child is started as `python -m toka_engine.<role> CONTROL_FD [LINK_FD ...]`. `run_child` is its outermost loop: it is
the one place where any exception becomes an exit code. A child dies with its parent.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import msgspec

from toka_engine.channel import Channel
from toka_engine.control_messages import (
    ChildReady,
    Drain,
    Failed,
    Failing,
    Ping,
    Pong,
    Progress,
    RankReports,
    ReplicaLost,
    Start,
    ToChild,
    Unresponsive,
)
from toka_engine.errors import ExitCode, PeerClosedError, TokaError
from toka_engine.logs import set_up_logging
from toka_engine.output import outlive_reader
from toka_engine.portable import count_resident_bytes, end_with_parent


class Child:
    """The child's side of its control link. A thread of its own answers pings, so a long step is not a stall."""

    def __init__(self, name: str, control: Channel[ToChild], start: Start, early: Sequence[ToChild] = ()) -> None:
        """`early`: messages that arrived together with `start`."""
        self.name = name
        self.start = start
        self.on_drain: Callable[[], None] | None = None
        """Called in the control thread when the supervisor asks to drain."""
        self.on_failing: Callable[[Failing], None] | None = None
        """Called in the control thread when another process is dead or stuck."""
        self.on_replica_lost: Callable[[ReplicaLost], None] | None = None
        """Called in the control thread when the engine goes on without one of its replicas."""
        self.on_unresponsive: Callable[[str], None] | None = None
        """Called in the control thread with the name of a process that does not answer, and "" when all do."""
        self.on_progress: Callable[[Progress], None] | None = None
        """Called in the control thread with what another process does while it starts."""
        self.on_rank_reports: Callable[[RankReports], None] | None = None
        """Called in the control thread, once a second, with what all ranks have done."""
        self.count_memory: Callable[[], int] = count_resident_bytes
        """Called in the control thread: bytes of its device that this process holds."""
        self._num_begun = 0
        self._num_done = 0
        self._control = control
        self._early = early
        self._busy_since: float | None = None
        threading.Thread(target=self._answer, name="control", daemon=True).start()

    def progress(self, phase: str, detail: str = "") -> None:
        self.send(Progress(phase, detail))

    def ready(self, device: str = "") -> None:
        """Report that this process serves; a rank names the type of its `device`."""
        self.send(ChildReady(device))

    def begin_step(self) -> None:
        """Count a step that this rank takes up: the supervisor compares ranks by it."""
        self._num_begun += 1

    def end_step(self) -> None:
        """Count a step that this rank has done."""
        self._num_done += 1

    def send(self, message: msgspec.Struct) -> None:
        """Send to the supervisor; any thread may. Raises PeerClosedError."""
        self._control.send(message)

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Mark one turn of the main loop: a turn that never ends is what the supervisor calls a stall."""
        self._busy_since = time.monotonic()
        try:
            yield
        finally:
            self._busy_since = None

    def _answer(self) -> None:
        # Waits for reading only: what a send of another thread leaves unsent goes out with the next one.
        poller = select.poll()
        poller.register(self._control.fileno(), select.POLLIN)
        try:
            for message in self._early:
                self._handle(message)
            while True:
                poller.poll()
                for message in self._control.receive_ready():
                    self._handle(message)
        except PeerClosedError:
            os._exit(ExitCode.PROCESS_DIED)  # the supervisor is gone: nobody is left to serve
        except Exception:  # the outermost loop of the thread
            traceback.print_exc()
            os._exit(ExitCode.PROCESS_DIED)

    def _handle(self, message: ToChild) -> None:
        match message:
            case Ping(number):
                self.send(self._answer_ping(number))
            case Drain():
                if self.on_drain:
                    self.on_drain()
            case Failing():
                if self.on_failing:
                    self.on_failing(message)
            case ReplicaLost():
                if self.on_replica_lost:
                    self.on_replica_lost(message)
            case Unresponsive(process):
                if self.on_unresponsive:
                    self.on_unresponsive(process)
            case Progress():
                if self.on_progress:
                    self.on_progress(message)
            case RankReports():
                if self.on_rank_reports:
                    self.on_rank_reports(message)
            case Start():
                raise AssertionError("a second Start")

    def _answer_ping(self, number: int) -> Pong:
        since = self._busy_since
        busy_s = 0.0 if since is None else time.monotonic() - since
        num_done = self._num_done  # first: a step is begun before it is done
        return Pong(number, busy_s, self._num_begun, num_done, time.process_time(), self.count_memory())


def run_child(name: str, main: Callable[[Child, list[int]], None]) -> NoReturn:
    """Run `main(child, link_fds)` as this process and end it with an exit code of the table.

    `name` is that of its role, for a `Start` that has none. Signals that a terminal sends to the whole group are left
    to the supervisor.
    """
    outlive_reader()
    end_with_parent()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    control: Channel[ToChild] = Channel.from_fd(int(sys.argv[1]), ToChild)
    start, *early = control.receive()
    if not isinstance(start, Start):
        raise AssertionError(f"{name}: the first message was not Start")
    name = start.process or name
    set_up_logging(start.config, name)
    child = Child(name, control, start, early)
    code, words, is_consequence = ExitCode.OK, "", False
    try:
        main(child, [int(fd) for fd in sys.argv[2:]])
    except PeerClosedError as error:
        words, is_consequence = f"{name}: a process beside it is gone ({error})", True
        code = error.exit_code
    except TokaError as error:
        code, words = error.exit_code, str(error)
    except Exception as error:  # the outermost loop of the process
        traceback.print_exc()
        code, words = ExitCode.PROCESS_DIED, f"{name}: {type(error).__name__}: {error}"
    if code is not ExitCode.OK:
        with contextlib.suppress(PeerClosedError):
            child.send(Failed(int(code), words, is_consequence))
    sys.stderr.flush()
    os._exit(code)  # threads of libraries must not hold up the end
