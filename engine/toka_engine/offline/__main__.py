"""`python -m toka_engine.offline LISTEN_FD key=value ...`: the supervisor of an engine that belongs to a script.

It listens on the script's socket, writes `ready` to its stdout once, and ends when its stdin does: with the script,
however that ends.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading

from toka_engine.entry import run


def main() -> None:
    """Run the engine to its end; the exit code is that of `toka`."""
    listener = socket.socket(fileno=int(sys.argv[1]))
    listener.set_inheritable(False)
    report = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no report
    threading.Thread(target=_end_with_script, daemon=True).start()
    sys.exit(run(sys.argv[2:], listener=listener, on_ready=lambda: _report_ready(report)))


def _report_ready(report: int) -> None:
    try:
        os.write(report, b"ready\n")
    except BrokenPipeError:
        return  # the script is gone, which the other thread sees too


def _end_with_script() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)  # what still runs is given up at once: see `process`


if __name__ == "__main__":
    main()
