"""One child process as the supervisor sees it: its control link, its heartbeat, how it ended.

Owns spawning (only the file descriptors a child needs are inherited, no shell, a process group of its own, so that a
terminal's Ctrl-C reaches the supervisor alone) and the counting of silent heartbeats. Decides nothing: what a death or
a silence means is the supervisor's business.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from toka_engine.channel import Channel, socket_pair
from toka_engine.control_messages import ChildReady, Failed, FromChild, Ping, Pong, Start, ToChild
from toka_engine.errors import PeerClosedError
from toka_engine.portable import is_running, is_stopped
from toka_engine.rank_watch import Place
from toka_engine.thread_waiting import with_bounded_spinning
from toka_engine.topology import Process, Role

PING_INTERVAL_S = 0.25
SILENT_PINGS_UNSURE = 2
"""Silence of 0.5 to 0.75 s: readiness off, and on again when the process answers."""
SILENT_PINGS_STALLED = 12
"""Silence of about 3 s: the process is stuck. With the grace below the engine has ended within 5 s."""
SILENT_PINGS_STARVED = 60
"""The same for one that gets too little of the CPU to answer, or that computes without giving up Python's lock: 15 s.
Where more programs than CPUs run, or a quota throttles the container, it would have answered in the end."""
MAX_BUSY_S = {Role.SERVER: 20.0, Role.MANAGER: 30.0, Role.MODEL: 120.0}
"""One turn of a main loop, by role. The longest honest step, 8,192 prompt tokens in fp32 on two cores, takes 13 s."""
BUSY_PONGS_STALLED = 4
"""This many answers in a row must tell of one: the first after a pause of the whole container tells of the pause."""

_OOM_COUNTERS = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")


class ChildProcess:
    """A spawned child. Live state: mutated by the supervisor's loop only."""

    def __init__(self, process: Process, module: str, start: Start, link_fds: Sequence[int] = ()) -> None:
        """Spawn `python -m module CONTROL_FD *link_fds` and send `start`. The caller closes `link_fds` afterwards."""
        ours, theirs = socket_pair()
        self.name, self.role, self.rank = process.name, process.role, process.rank
        self.control: Channel[FromChild] = Channel(ours, FromChild)
        with theirs:
            self.pid = _spawn(module, [theirs.fileno(), *link_fds])
        self.is_ready = False
        self.is_given_up = False
        """Its end is meant, and no failure of the engine."""
        self.is_linked = True
        """The control link is open."""
        self.status: int | None = None
        """Status of waitpid, once reaped."""
        self.exit_message: Failed | None = None
        self.busy_s = 0.0
        self.busy_pongs = 0
        """Answers in a row that told of a turn longer than MAX_BUSY_S."""
        self.silent_pings = 0
        self.has_answered = False
        """Its control thread runs."""
        self.device = ""
        """Type of a rank's device, once it is ready."""
        self.place = Place(0, 0)
        self.cpu_s = 0.0
        self.memory_bytes = 0
        self._is_ping_out = False
        self._num_pings = 0
        self.send(msgspec.structs.replace(start, process=process.name, rank=process.rank))

    @property
    def is_running(self) -> bool:
        return self.status is None

    def send(self, message: ToChild) -> None:
        """Send, or note that the child is gone (its status follows by SIGCHLD)."""
        try:
            self.control.send(message)
        except PeerClosedError:
            self.is_linked = False

    def receive(self) -> list[FromChild]:
        """Return what has arrived; heartbeats and exit messages are taken in here too."""
        if not self.is_linked:
            return []
        try:
            messages = self.control.receive_ready()
        except PeerClosedError:
            self.is_linked = False
            return []
        for message in messages:
            if isinstance(message, Pong):
                self._take_pong(message)
            elif isinstance(message, ChildReady):
                self.is_ready = True
                self.device = message.device
            elif isinstance(message, Failed):
                self.exit_message = message
        return messages

    def _take_pong(self, pong: Pong) -> None:
        self.busy_s = pong.busy_s
        is_long = pong.busy_s > MAX_BUSY_S.get(self.role, math.inf)
        self.busy_pongs = self.busy_pongs + 1 if is_long else 0
        self.place = Place(pong.num_begun, pong.num_done)
        self.cpu_s, self.memory_bytes = pong.cpu_s, pong.memory_bytes
        self.has_answered = True
        self.forget_silence()

    def forget_silence(self) -> None:
        """Begin to count anew, as after an answer."""
        self.silent_pings = 0
        self._is_ping_out = False

    def beat(self) -> None:
        """Count an unanswered ping, or send the next. Called every PING_INTERVAL_S."""
        if self._is_ping_out:
            self.silent_pings += 1
            return
        self._num_pings += 1
        self._is_ping_out = True
        self.send(Ping(self._num_pings))

    def kill(self) -> None:
        """End it and whatever it started; harmless when it has ended."""
        if self.is_running:
            for end in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    end(self.pid, signal.SIGKILL)

    def describe_end(self) -> str:
        """Return how it ended, in words."""
        if self.exit_message:
            return self.exit_message.message
        if self.status is None:
            return f"{self.name} closed its control link"
        code = os.waitstatus_to_exitcode(self.status)
        if code < 0:
            return f"{self.name} was ended by {signal.Signals(-code).name}"
        return f"{self.name} ended with code {code}"

    @property
    def is_stopped(self) -> bool:
        """Stopped by a signal, as a debugger or a person does it."""
        return is_stopped(self.pid)

    @property
    def is_at_work(self) -> bool:
        """It runs, or would if it got a CPU: a silent one is not locked up, or not yet known to be."""
        return is_running(self.pid)

    @property
    def is_end_a_consequence(self) -> bool:
        return self.exit_message is not None and self.exit_message.is_consequence

    @property
    def was_killed(self) -> bool:
        """Ended by SIGKILL: by a person, or by the kernel for memory."""
        return self.status is not None and os.waitstatus_to_exitcode(self.status) == -signal.SIGKILL


def _spawn(module: str, fds: Sequence[int]) -> int:
    # -P: `-m` would put the working directory first on the path, and a stray numpy.py there would be run.
    arguments = [sys.executable, "-P", "-m", module, *map(str, fds)]
    for fd in fds:
        os.set_inheritable(fd, True)
    try:
        return os.posix_spawn(
            sys.executable,
            arguments,
            with_bounded_spinning(os.environ),
            file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)],
            setpgroup=0,
        )
    finally:
        for fd in fds:
            os.set_inheritable(fd, False)


def reap() -> dict[int, int]:
    """Collect every ended process, ours or (as process 1 of a container) adopted; return wait statuses by pid."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = status


def count_oom_kills() -> int:
    """Count the processes of this cgroup that the kernel has killed for memory; 0 where that cannot be read."""
    for path in _OOM_COUNTERS:
        with contextlib.suppress(OSError):
            for line in Path(path).read_text().splitlines():
                key, _, value = line.partition(" ")
                if key == "oom_kill":
                    return int(value)
    return 0
