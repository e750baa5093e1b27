"""The engine of a script as a process: how it is started, when it is ready, why it ended.

Owns the process, its socket and the folder that holds it. A failure to start, and an end that nobody asked for, become
the error of `errors` that the engine ended with.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toka_engine import errors
from toka_engine.command_line import parse_config
from toka_engine.errors import ConfigError, EngineDiedError, ExitCode, TokaError

_BACKLOG = 2048
_END_S = 10.0
"""Longest wait for an engine to end that was told to, or whose connection broke."""
_DEFAULTS = {"log_level": "WARNING", "uvicorn_log_level": "warning"}
_FIXED = {"drain_timeout_s": 0.1, "drain_endpoint_delay_s": 0, "status_page": False}
_MEANINGLESS = {
    "host": "there is no port to listen on",
    "port": "there is no port to listen on",
    "termination_log": "the error is raised",
    "api_keys_file": "nobody but the script can ask",
    "status_page": "nobody but the script can ask",
    "vllm_metric_names": "nobody but the script can ask",
    "drain_timeout_s": "closing ends what still runs",
    "drain_endpoint_delay_s": "closing ends what still runs",
}
_ERRORS: dict[ExitCode, type[TokaError]] = {
    kind.exit_code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, TokaError) and "exit_code" in vars(kind) and kind is not TokaError
}
"""The class of each way to end that has one of its own."""


class ScriptEngine:
    """An engine that runs until `close`, or until this process ends."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Start the processes. `settings` are the keys of `toka --help`. Raises ConfigError."""
        for key, reason in _MEANINGLESS.items():
            if key in settings:
                raise ConfigError(f"{key} has no effect in a script and is refused: {reason}")
        words = [f"{key}={_write(value)}" for key, value in {**_DEFAULTS, **settings, **_FIXED}.items()]
        self.config = parse_config(words)
        self._folder = Path(tempfile.mkdtemp(prefix="toka-"))  # for this user alone
        self._last_words = self._folder / "words"
        self.socket_path = str(self._folder / "http")
        self._is_closed = False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                listener.bind(self.socket_path)
                listener.listen(_BACKLOG)
                command = [sys.executable, "-P", "-m", "toka_engine.offline", str(listener.fileno()), *words]
                self._process = subprocess.Popen(
                    [*command, f"termination_log={self._last_words}"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env={name: value for name, value in os.environ.items() if name != "TOKA_API_KEY"},
                    pass_fds=(listener.fileno(),),
                    start_new_session=True,  # Ctrl-C is the script's to handle
                )
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    def wait_ready(self) -> None:
        """Return when the engine serves. Raises the error of the tree that it ended with."""
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            error = self.wait_end()
            self.close()
            raise error or EngineDiedError("the engine ended before it was ready")

    def wait_end(self) -> TokaError | None:
        """Return why the engine has ended, or is ending now; None if it does not end."""
        if self._is_closed:
            return EngineDiedError("the engine has been closed")
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return None
        try:
            words = self._last_words.read_text(encoding="utf-8")
        except OSError:
            words = f"the engine ended with code {code}"
        return _to_error(code, words)

    def close(self) -> None:
        """End every process of the engine and remove its folder. May be called again."""
        if self._is_closed:
            return
        self._is_closed = True
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # the others end with it
            self._process.wait()
        self._process.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _write(value: Any) -> str:
    """Write a setting as the command line takes it."""
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _to_error(code: int, words: str) -> TokaError:
    known = code in {int(one) for one in ExitCode}
    kind = _ERRORS.get(ExitCode(code), EngineDiedError) if known else EngineDiedError
    return kind(words.partition(": ")[2] or words)
