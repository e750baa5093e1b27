"""`toka`: the command line to a running engine, and an engine's end to an exit code.

Owns the port (taken before anything is loaded, so that a second engine ends at once) and the exit message: one line on
stderr and in the termination log. The outermost loop of the first process.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from toka_engine.command_line import format_help, parse_config
from toka_engine.config import EngineConfig
from toka_engine.errors import REASONS, ConfigError, ExitCode, PortInUseError, TokaError
from toka_engine.logs import set_up_logging
from toka_engine.output import outlive_reader, run_command
from toka_engine.supervisor import MODULES, Outcome, Supervisor
from toka_engine.version import __version__

_TERMINATION_LOG = "/dev/termination-log"
_MAX_EXIT_MESSAGE_BYTES = 4096
"""Bytes that Kubernetes keeps of a termination message."""
_BACKLOG = 2048


def main() -> None:
    """Entry point of the command `toka`."""
    arguments = sys.argv[1:]
    if {"--help", "-h"} & {*arguments}:
        run_command(lambda: print(format_help()))
    if "--version" in arguments:
        run_command(lambda: print(f"toka {__version__}"))
    sys.exit(run(arguments))


def run(
    arguments: Sequence[str],
    modules: Mapping[str, str] = MODULES,
    *,
    listener: socket.socket | None = None,
    on_ready: Callable[[], None] = lambda: None,
) -> ExitCode:
    """Run the engine that `arguments` describe until it ends; write its exit message where it belongs.

    It listens on `listener`, or else on the port of the settings, and calls `on_ready` once.
    """
    outlive_reader()
    termination_log = _TERMINATION_LOG
    try:
        config = parse_config(arguments)
        termination_log = config.termination_log or _TERMINATION_LOG
        set_up_logging(config, "supervisor")
        outcome = Supervisor(config, listener or listen(config), modules, on_ready).run()
    except TokaError as error:
        outcome = Outcome(error.exit_code, str(error))
    except Exception as error:  # the outermost loop of the process
        traceback.print_exc()
        outcome = Outcome(ExitCode.PROCESS_DIED, f"supervisor: {type(error).__name__}: {error}")
    if outcome.code is not ExitCode.OK:
        write_exit_message(outcome, termination_log)
    return outcome.code


def listen(config: EngineConfig) -> socket.socket:
    """Take the port. Raises PortInUseError, or ConfigError for an address that is not ours."""
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Only a listening socket holds its port: bound ones with SO_REUSEADDR may be several.
        listener.listen(_BACKLOG)
    except socket.gaierror as error:
        raise ConfigError(f"host={config.host}: {error.strerror}") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortInUseError(f"port {config.port} is taken by another program") from error
        raise ConfigError(f"cannot listen on {config.host}:{config.port}: {error.strerror}") from error
    return listener


def write_exit_message(outcome: Outcome, termination_log: str) -> None:
    """Write why the engine ends to stderr and to the termination log, where there is one."""
    words = f"{REASONS[outcome.code]}: {outcome.words}"
    print(f"toka: {words}", file=sys.stderr, flush=True)
    path = Path(termination_log)
    if termination_log != _TERMINATION_LOG or path.exists():
        with contextlib.suppress(OSError):
            cut = words.encode("utf-8", "replace")[:_MAX_EXIT_MESSAGE_BYTES]
            path.write_text(cut.decode("utf-8", "ignore"), encoding="utf-8")


if __name__ == "__main__":
    main()
