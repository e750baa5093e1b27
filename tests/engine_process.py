"""The engine as a real process, for every test that starts one: its log, its children's pids, its end.

Used by the supervisor's tests (with stand-in children), tests/api and tests/fault (with the real ones).
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

ROOT = Path(__file__).resolve().parent.parent
WAIT_S = 200.0
"""A bound on waits for something that must happen; not a promise about speed."""

_STARTED = re.compile(r"event=started process=(\w+) pid=(\d+)")


class EngineProcess:
    """`python -m MODULE key=value ...` in a process of its own; ended with everything it started on exit."""

    def __init__(
        self, folder: Path, *arguments: str, module: str = "toka_engine", env: dict[str, str] | None = None
    ) -> None:
        self.folder = folder
        self._held_port, self.port = hold_port()
        self.termination_log = folder / "termination.log"
        self.arguments = [f"port={self.port}", "host=127.0.0.1", f"termination_log={self.termination_log}", *arguments]
        self._module = module
        self._env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT / part) for part in ("operator", "engine", ".")]
                + [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
            ),
            "OMP_WAIT_POLICY": "passive",  # threads that spin would take the cores from the other processes
            **(env or {}),
        }
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", self._module, *self.arguments],
            cwd=self.folder,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pid in [self.pid, *self.children.values()]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(WAIT_S)
        self._held_port.close()
        self._reader.join(WAIT_S)
        assert self.process.stderr is not None
        self.process.stderr.close()
        if kind is not None:
            print(self.log[-20000:], file=sys.stderr)

    @property
    def process(self) -> subprocess.Popen[str]:
        assert self._process is not None, "not entered"
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        with self._changed:
            return "".join(self._lines)

    @property
    def children(self) -> dict[str, int]:
        """Pids by process name."""
        return {name: int(pid) for name, pid in _STARTED.findall(self.log)}

    def wait_for_log(self, text: str, timeout_s: float = WAIT_S) -> None:
        """Wait until `text` stands in the log; AssertionError if the engine ends first or `timeout_s` passes."""
        with self._changed:
            found = self._changed.wait_for(
                lambda: any(text in line for line in self._lines) or not self._reader.is_alive(), timeout_s
            )
            assert found, f"{text!r} did not appear in the log"
        assert text in self.log, f"the engine ended without {text!r}"

    def wait_ready(self) -> None:
        # Other processes log a readiness of their own.
        self.wait_for_log("logger=toka.supervisor event=ready")

    def signal(self, signum: signal.Signals, process: str | None = None) -> None:
        """Send `signum` to the supervisor or to the child `process`."""
        os.kill(self.children[process] if process else self.pid, signum)

    def wait_end(self, timeout_s: float = WAIT_S) -> int:
        """Wait for the end; return the exit code. Afterwards the log is complete."""
        code = self.process.wait(timeout_s)
        self._reader.join(WAIT_S)
        return code

    def last_words(self) -> str:
        return self.termination_log.read_text()

    def get(self, path: str, timeout_s: float = 10.0) -> int:
        """The HTTP status of a GET, or 0 where there is no answer."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=timeout_s) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def read(self, path: str) -> str:
        """The body of a GET that must succeed."""
        with urllib.request.urlopen(self.url + path, timeout=30.0) as response:
            return str(response.read().decode())

    def _read(self) -> None:
        stream = self.process.stderr
        assert stream is not None
        for line in stream:
            with self._changed:
                self._lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()


def hold_port() -> tuple[socket.socket, int]:
    """A free port that is ours while the socket is open, though an engine may listen on it.

    It is bound, so the kernel gives its port to nobody who asks for any. It does not listen and has SO_REUSEADDR, set
    after its own bind: a program that sets that too and names the port may take it.
    """
    holder = socket.socket()
    holder.bind(("127.0.0.1", 0))
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return holder, int(holder.getsockname()[1])


def is_alive(pid: int) -> bool:
    """The process exists and is no zombie."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
