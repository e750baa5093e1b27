"""Processes that outlive a call, each recorded on disk by pid and start time, so that none is forgotten.

A session's processes die with it: the kernel kills them when the thread that started them goes (`setpriv
--pdeathsig`), so start them from the main thread. Those of a kept cluster (the quickstart's) live on. Either
way `RunFolder.stop` finds them again from the record, and a pid that has been given to another process since
is never touched, because its start time differs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.harness.errors import HarnessError
from tests.cluster.harness.paths import cluster_cache, only_one, run_root

_STOP_DEADLINE_S = 20.0


def start_time_of(pid: int) -> int | None:
    """The time at which a process started, in clock ticks since boot; None if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


@dataclass(slots=True)
class ProcessHandle:
    """A process of ours: its output goes to `log_file`, never to a pipe that somebody would wait on."""

    name: str
    popen: subprocess.Popen[bytes]
    log_file: Path
    started: float = field(default_factory=time.monotonic)
    """The time of its start (monotonic)."""

    @property
    def pid(self) -> int:
        """The pid of the process itself (commands are exec'ed, not wrapped)."""
        return self.popen.pid

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self.popen.poll() is None

    def log(self, last_bytes: int = 1_000_000) -> str:
        """The end of what it has written so far."""
        if not self.log_file.exists():
            return ""
        return self.log_file.read_bytes()[-last_bytes:].decode(errors="replace")

    def send_signal(self, number: int) -> None:
        """Send a signal, if it is still running."""
        self.popen.send_signal(number)

    def kill(self) -> None:
        """SIGKILL it and wait for its end."""
        self.popen.kill()
        self.popen.wait()

    def terminate(self, timeout_s: float = 30.0) -> int:
        """SIGTERM it and return its exit status; a process that stays is killed and reported."""
        self.popen.terminate()
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise HarnessError(f"{self.name} did not end within {timeout_s} s of SIGTERM:\n{self.log(4000)}") from None


@dataclass(slots=True)
class RunFolder:
    """One running cluster's own folder: its record of processes and control groups, its logs and its keys."""

    name: str
    is_kept: bool = False
    processes: dict[str, ProcessHandle] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The folder itself."""
        return run_root() / self.name

    @property
    def logs(self) -> Path:
        """One log file per process."""
        return self.path / "log"

    @property
    def _record(self) -> Path:
        return self.path / "processes.jsonl"

    def create(self) -> None:
        """Begin an empty run: end what an earlier one of the same name, or a crashed owner, left."""
        with only_one(_sweep_lock()):
            _sweep()
            self.stop()
            shutil.rmtree(self.path, ignore_errors=True)
            self.logs.mkdir(parents=True)
            owner = None if self.is_kept else [os.getpid(), start_time_of(os.getpid())]
            (self.path / "owner.json").write_text(json.dumps(owner))

    def spawn(
        self,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        *,
        pass_fds: tuple[int, ...] = (),
    ) -> ProcessHandle:
        """Start a process; `env` replaces the environment. Its record is on disk when this returns."""
        log_file = self.logs / f"{name}.log"
        parent_death = [] if self.is_kept else ["setpriv", "--pdeathsig", "KILL", "--"]
        with log_file.open("ab") as log:
            popen = subprocess.Popen(
                [*parent_death, *argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                pass_fds=pass_fds,
                start_new_session=True,
            )
        self.record(name, popen.pid)
        handle = ProcessHandle(name, popen, log_file)
        self.processes[name] = handle
        return handle

    def record(self, name: str, pid: int) -> None:
        """Remember a process that must end with this run."""
        with self._record.open("a") as record:
            record.write(json.dumps([name, pid, start_time_of(pid)]) + "\n")

    def recorded(self) -> list[tuple[str, int]]:
        """Name and pid of every recorded process that still runs, whichever process of ours started it."""
        if not self._record.exists():
            return []
        entries = [json.loads(line) for line in self._record.read_text().splitlines()]
        return [(name, pid) for name, pid, started in entries if started and start_time_of(pid) == started]

    def kill_recorded(self, machine: str) -> None:
        """Kill a machine's recorded processes (`machine` and `machine.*`) and wait until each is gone."""
        mine = [(name, pid) for name, pid in self.recorded() if name.split(".")[0] == machine]
        self._kill(mine)

    def stop(self) -> None:
        """Kill every recorded process, wait until each is gone, remove the control groups. Logs stay."""
        self._kill(self.recorded())
        self.processes.clear()
        self._record.unlink(missing_ok=True)
        _remove_control_groups(self.name)

    def _kill(self, running: list[tuple[str, int]]) -> None:
        for _, pid in running:
            with contextlib.suppress(ProcessLookupError):  # a machine's processes go with its first
                os.kill(pid, signal.SIGKILL)
        for name, _ in running:
            if name in self.processes:
                self.processes.pop(name).popen.wait()
        deadline = time.monotonic() + _STOP_DEADLINE_S
        for name, pid in running:
            while start_time_of(pid) is not None:
                if time.monotonic() > deadline:
                    raise HarnessError(f"{name} (pid {pid}) of cluster {self.name} did not end after SIGKILL")
                time.sleep(0.01)

    def owner_is_gone(self) -> bool:
        """Whether the session that started it has ended without stopping it."""
        try:
            owner = json.loads((self.path / "owner.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return False
        return owner is not None and start_time_of(owner[0]) != owner[1]

    def logs_tail(self, lines_each: int = 15) -> str:
        """The last lines of every log, for a failure's text."""
        parts = []
        for log_file in sorted(self.logs.glob("*.log")):
            tail = log_file.read_bytes()[-20_000:].decode(errors="replace").splitlines()[-lines_each:]
            parts.append(f"--- {log_file.name}\n" + "\n".join(line[:400] for line in tail))
        return "\n".join(parts)


def sweep() -> None:
    """Stop and remove every run whose owner has died without doing it. Any number of processes may call it at once."""
    with only_one(_sweep_lock()):
        _sweep()


def _sweep_lock() -> Path:
    """One sweeps at a time: a second one would remove what the first reads, or a new run with a dead one's name."""
    return cluster_cache() / "sweep.lock"


def _sweep() -> None:
    for folder in sorted(run_root().glob("*")) if run_root().exists() else []:
        run = RunFolder(folder.name)
        if run.owner_is_gone():
            run.stop()
            shutil.rmtree(folder, ignore_errors=True)


def control_group_prefix(run_name: str) -> str:
    """The name under which a run's nodes have their control groups."""
    return f"toka-{run_name}-"


def control_groups(run_name: str) -> list[Path]:
    """The roots of a run's control groups: version 2 has one hierarchy, version 1 several."""
    groups, name = Path("/sys/fs/cgroup"), f"{control_group_prefix(run_name)}*"
    return [*groups.glob(name), *groups.glob(f"*/{name}")]


def _remove_control_groups(run_name: str) -> None:
    """Remove a run's empty control groups, deepest first. They empty a moment after their processes die."""
    deadline = time.monotonic() + _STOP_DEADLINE_S
    for root in control_groups(run_name):
        for folder, _, _ in os.walk(root, topdown=False):
            while os.path.exists(folder):
                try:
                    os.rmdir(folder)
                except OSError as error:
                    if time.monotonic() > deadline:
                        raise HarnessError(f"cannot remove the control group {folder}: {error}") from error
                    time.sleep(0.02)
