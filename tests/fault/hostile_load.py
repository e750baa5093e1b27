"""Hostile requests beside plain ones: `python -m tests.fault.hostile_load [SECONDS]`, 8 of each kind by default.

A real server process with a scripted manager answers plain requests for one token, from a process of their own, while
others send bombs: schemas, regular expressions, 10,000 values, references without an end, 128 tools of 64 KiB, calls
that nobody waits for, and grammar processes that are killed or stopped. Prints one JSON object: of each kind the
statuses of its answers and the plain requests' p99 beside the calm one, and how the server's memory grew. The exit code
is 0 where every hostile answer is a 2xx, a 4xx or one 5xx with a code, and no plain request failed.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import psutil
from toka_engine.builtin import ensure_builtin

from tests.engine_process import WAIT_S
from tests.unit.server.conftest import chat_body, completion_body
from tests.unit.server.harness import RunningServer, running_server, speak
from tests.unit.server.test_grammar_checks import BOMBS

NUM_SENDERS = 4
_IDS = [504, 3575, 282, 4649]
_JSON = {"content-type": "application/json"}
_COMPLETIONS, _CHAT = "/v1/completions", "/v1/chat/completions"
_SPAWN = multiprocessing.get_context("spawn")
"""Clients are processes of their own: the scripted manager, which answers them, is a thread of this one."""
_numbers = itertools.count(os.getpid() << 20)


class Target(NamedTuple):
    """A server, as another process reaches it."""

    port: int
    pid: int

    def checkers(self) -> list[psutil.Process]:
        """Return the server's grammar processes."""
        found = []
        for child in psutil.Process(self.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):  # ended, and perhaps not yet waited for
                if "toka_engine.grammar" in child.cmdline():
                    found.append(child)
        return found


class Asked:
    """The answers to one kind of hostile request."""

    def __init__(self) -> None:
        self.statuses: Counter[str] = Counter()
        self._lock = threading.Lock()

    def count(self, status: int, raw: bytes) -> None:
        code = "" if status < 400 else f" {json.loads(raw)['error'].get('code')}"
        with self._lock:
            self.statuses[f"{status}{code}"] += 1

    @property
    def is_clear(self) -> bool:
        """Whether each answer says what is wrong."""
        return not any(
            status.startswith("5") and status.endswith(("None", "internal_error")) for status in self.statuses
        )


Kind = Callable[[Target, Asked], None]


def _post(target: Target, asked: Asked, path: str, body: dict[str, Any]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=WAIT_S)
    with contextlib.closing(connection):
        connection.request("POST", path, json.dumps(body), _JSON)
        answer = connection.getresponse()
        asked.count(answer.status, answer.read())


def _bomb(name: str) -> Kind:
    """A bomb that no earlier answer is known for."""
    ((field, source),) = BOMBS[name].items()

    def send(target: Target, asked: Asked) -> None:
        number = next(_numbers)
        if isinstance(source, dict):
            fresh: Any = {**source, "title": f"n{number}"}
        else:
            fresh = f"{source}\n// {number}" if field == "guided_grammar" else f"{source}x{number}"
        _post(target, asked, _COMPLETIONS, completion_body(**{field: fresh}))

    return send


def _refer_without_end(target: Target, asked: Asked) -> None:
    names = [f"a{next(_numbers)}" for _ in range(200)]
    links = {name: {"allOf": [{"$ref": f"#/$defs/{after}"}]} for name, after in itertools.pairwise([*names, names[0]])}
    _post(target, asked, _COMPLETIONS, completion_body(guided_json={"$ref": f"#/$defs/{names[0]}", "$defs": links}))


def _send_many_tools(target: Target, asked: Asked) -> None:
    number = next(_numbers)
    tools = [
        {
            "type": "function",
            "function": {
                "name": f"tool{number}_{each}",
                "description": "x" * 60_000,
                "parameters": {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(100)}},
            },
        }
        for each in range(128)
    ]
    _post(target, asked, _CHAT, chat_body(tools=tools, tool_choice="required"))


def _leave_in_a_call(target: Target, asked: Asked) -> None:
    """Leave a streamed answer, which is a call, behind its first bytes."""
    function = {"name": "now", "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}}}
    body = chat_body(
        tools=[{"type": "function", "function": function}], tool_choice="required", stream=True, max_tokens=64
    )
    connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=WAIT_S)
    with contextlib.closing(connection):
        connection.request("POST", _CHAT, json.dumps(body), _JSON)
        answer = connection.getresponse()
        asked.count(answer.status, answer.read(64) if answer.status == 200 else answer.read())


def _lose_checkers(number: signal.Signals) -> Kind:
    """Ask for a new grammar while its process, whatever it does, gets a signal."""

    def send(target: Target, asked: Asked) -> None:
        for checker in target.checkers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(checker.pid, number)
        _post(target, asked, _COMPLETIONS, completion_body(guided_regex=f"lost{next(_numbers)}"))

    return send


KINDS: dict[str, Kind] = {
    **{name: _bomb(name) for name in BOMBS},
    "references without end": _refer_without_end,
    "128 tools of 64 KiB": _send_many_tools,
    "clients that leave inside a call": _leave_in_a_call,
    "grammar process killed": _lose_checkers(signal.SIGKILL),
    "grammar process stopped": _lose_checkers(signal.SIGSTOP),
}


def ask_plainly(port: int, end: Connection) -> None:
    """Ask for one token again and again; answer each message with the seconds that each request has taken since the
    last one, and the number of failures. None ends it.
    """
    body = json.dumps(completion_body(max_tokens=1))
    took_s: list[float] = []
    num_failed = 0
    while True:
        if end.poll():
            if end.recv() is None:
                return
            end.send((took_s, num_failed))
            took_s, num_failed = [], 0
        begin_s = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
        with contextlib.closing(connection):
            connection.request("POST", _COMPLETIONS, body, _JSON)
            answer = connection.getresponse()
            answer.read()
            num_failed += answer.status != 200
        took_s.append(time.monotonic() - begin_s)
        time.sleep(0.005)


@contextlib.contextmanager
def plain_clients(port: int) -> Iterator[Connection]:
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=ask_plainly, args=(port, theirs), daemon=True)
    process.start()
    try:
        yield ours
    finally:
        ours.send(None)
        process.join(WAIT_S)


def measure(plain: Connection) -> tuple[list[float], int]:
    """Return what the plain requests took since the last time, and how many failed."""
    plain.send(True)
    found: tuple[list[float], int] = plain.recv()
    return found


def p99_ms(took_s: list[float]) -> float:
    return round(1e3 * statistics.quantiles(took_s, n=100)[-1], 1) if len(took_s) > 1 else float("nan")


def press(target: Target, name: str, seconds: float, end: Connection) -> None:
    """Send requests of the kind `name` from several threads for so long, and say what came of them."""
    kind, asked = KINDS[name], Asked()
    kind(target, Asked())  # the first use of anything is in no figure
    end.send(None)
    end.recv()
    until_s = time.monotonic() + seconds

    def send() -> None:
        while time.monotonic() < until_s:
            kind(target, asked)

    senders = [threading.Thread(target=send) for _ in range(NUM_SENDERS)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    end.send(asked.statuses)


@contextlib.contextmanager
def hostile_clients(target: Target, name: str, seconds: float) -> Iterator[Connection]:
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=press, args=(target, name, seconds, theirs), daemon=True)
    process.start()
    ours.recv()
    try:
        yield ours
    finally:
        process.join(WAIT_S)


def memory_mb(server: RunningServer) -> float:
    return float(round(psutil.Process(server.process.pid).memory_info().rss / 1e6, 1))


def run(server: RunningServer, seconds: float) -> bool:
    """Press with each kind in turn, calm before each; print the figures and return whether all was well."""
    server.manager.on_submit = lambda submit: speak(server.manager, submit, _IDS * 16)
    report: dict[str, Any] = {}
    is_well = True
    target = Target(server.port, server.process.pid)
    with plain_clients(server.port) as plain:
        for name in KINDS:
            with hostile_clients(target, name, seconds) as hostile:
                measure(plain)
                before_mb = memory_mb(server)
                time.sleep(seconds / 2)
                calm, num_failed = measure(plain)
                hostile.send(True)
                asked = Asked()
                asked.statuses = hostile.recv()
                pressed, num_more_failed = measure(plain)
            is_well &= asked.is_clear and not num_failed + num_more_failed
            report[name] = {
                "answers": dict(asked.statuses),
                "plain_p99_ms": [p99_ms(calm), p99_ms(pressed)],
                "plain_failed": num_failed + num_more_failed,
                "memory_mb": [before_mb, memory_mb(server)],
            }
            print(name, json.dumps(report[name]), file=sys.stderr, flush=True)
    print(json.dumps(report))
    return is_well


def main() -> int:
    """Run with the arguments of the command line."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 8.0
    with running_server(ensure_builtin(), access_log=False, log_level="ERROR") as server:
        return 0 if run(server, seconds) else 1


if __name__ == "__main__":
    sys.exit(main())
