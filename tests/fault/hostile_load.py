"""Hostile requests beside plain ones: `python -m tests.fault.hostile_load [SECONDS [KIND ...]]`; 8 s of all by default.

A real server process with a scripted manager answers plain requests for one token, from a process of their own, while
others send bombs: schemas, regular expressions, 10,000 values, references without an end, 128 tools of 64 KiB, calls
that nobody waits for, and helping processes that are killed, stopped or short of memory. Calm and hostile seconds take
turns, so that what else runs on the machine meets both; what senders take by themselves shows in requests that are
refused at once. Each kind has a server of its own. Prints one JSON object: of each kind the statuses of its
answers, the plain requests' p50 and p99 in calm and in hostile seconds, and how the server's memory grew. The exit code
is 0 where every hostile answer is a 2xx, a 4xx or one 5xx with a code, and no plain request failed.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import itertools
import json
import multiprocessing
import os
import resource
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
from tests.unit.server.test_grammar_checks import BOMBS, hungry_schema, leave_room

NUM_SENDERS = 4
NUM_TURNS = 4
_IDS = [504, 3575, 282, 4649]
_JSON = {"content-type": "application/json"}
_COMPLETIONS, _CHAT = "/v1/completions", "/v1/chat/completions"
_SPAWN = multiprocessing.get_context("spawn")
"""Clients are processes of their own: the scripted manager, which answers them, is a thread of this one."""
_PACE_S = 0.2
_numbers = itertools.count(os.getpid() << 20)


class Target(NamedTuple):
    """A server, as another process reaches it."""

    port: int
    pid: int

    def helpers(self, module: str) -> list[psutil.Process]:
        """Return the server's processes that run `module`, and their own."""
        found = []
        for child in psutil.Process(self.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # ended, and perhaps not yet waited for
                if module in child.cmdline():
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


def _post(target: Target, asked: Asked, path: str, body: dict[str, Any] | bytes) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=WAIT_S)
    with contextlib.closing(connection):
        connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body), _JSON)
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


@functools.cache
def _many_tools(description: int, properties: int) -> bytes:
    """A body of 128 tools, with "@@" where a number makes it a new one: clients that encode would take the CPU."""
    tools = [
        {
            "type": "function",
            "function": {
                "name": f"tool@@_{each}",
                "description": "x" * description,
                "parameters": {
                    "type": "object",
                    "properties": {f"p{n}": {"type": "string"} for n in range(properties)},
                },
            },
        }
        for each in range(128)
    ]
    return json.dumps(chat_body(tools=tools, tool_choice="required")).encode()


def _send_many_tools(description: int, properties: int) -> Kind:
    def send(target: Target, asked: Asked) -> None:
        body = _many_tools(description, properties)
        _post(target, asked, _CHAT, body.replace(b"@@", b"%d" % next(_numbers)))

    return send


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


@functools.cache
def _many_keys(number: int) -> bytes:
    """A message of many keys, which none may have."""
    keys = {f"k{n}": n for n in range(number)}
    return json.dumps(chat_body(messages=[{"role": "user", "content": "Hi", **keys}])).encode()


def _send_many_keys(number: int) -> Kind:
    return lambda target, asked: _post(target, asked, _CHAT, _many_keys(number))


def _paced(kind: Kind) -> Kind:
    """Have one such request sent every `_PACE_S`, by all senders together."""

    def send(target: Target, asked: Asked) -> None:
        next_s = time.monotonic() + NUM_SENDERS * _PACE_S
        kind(target, asked)
        time.sleep(max(0.0, next_s - time.monotonic()))

    return send


@functools.cache
def _large_completion(field: str) -> bytes:
    """A body of some 2 MiB, nearly all of it in one field. The last of the ids is none, which is found at the end."""
    large = {
        "ids": {"prompt": [[1234] * 680] * 617 + [[10**9]]},
        "texts": {"prompt": ["word " * 820] * 512},
        "keys": {"logit_bias": {f"{key:08}": 1 for key in range(145_000)}},
    }
    return json.dumps(completion_body(max_tokens=1, **large[field]), separators=(",", ":")).encode()


def _send_large_completion(field: str) -> Kind:
    return _paced(lambda target, asked: _post(target, asked, _COMPLETIONS, _large_completion(field)))


def _signal_all(target: Target, module: str, number: signal.Signals) -> None:
    for helper in target.helpers(module):
        with contextlib.suppress(ProcessLookupError):
            os.kill(helper.pid, number)


def _lose_checkers(number: signal.Signals) -> Kind:
    """Ask for a new grammar while its process, whatever it does, gets a signal."""

    def send(target: Target, asked: Asked) -> None:
        _signal_all(target, "toka_engine.grammar", number)
        _post(target, asked, _COMPLETIONS, completion_body(guided_regex=f"lost{next(_numbers)}"))

    return send


def _starve_checkers(target: Target, asked: Asked) -> None:
    """Ask for a new grammar that needs more memory than its process, once started, may have."""
    for checker in target.helpers("toka_engine.grammar"):
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if checker.rlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
                leave_room(checker, 4 << 20)
    schema = hungry_schema(f"n{next(_numbers)}")
    _post(target, asked, _COMPLETIONS, completion_body(guided_json=schema))


def _lose_preparing_process(target: Target, asked: Asked) -> None:
    """Send a large request while the process for such ones, whatever it does, is killed."""
    _signal_all(target, "toka_engine.server.preparing", signal.SIGKILL)
    _post(target, asked, _CHAT, json.dumps(chat_body()).encode() + b" " * 100_000)


def _be_refused(target: Target, asked: Asked) -> None:
    """Send what costs a server nothing to speak of: the senders have the CPUs."""
    _post(target, asked, _COMPLETIONS, completion_body(model="none"))


KINDS: dict[str, Kind] = {
    "refused at once": _be_refused,
    **{name: _bomb(name) for name in BOMBS},
    "references without end": _refer_without_end,
    "128 tools of 64 KiB": _send_many_tools(60_000, 100),
    "128 tools of many keys": _send_many_tools(0, 480),
    "300,000 keys": _send_many_keys(300_000),
    "4,000 keys": _send_many_keys(4_000),
    "2 MiB of prompts as ids": _send_large_completion("ids"),
    "2 MiB of prompts as texts": _send_large_completion("texts"),
    "2 MiB of biases": _send_large_completion("keys"),
    "clients that leave inside a call": _leave_in_a_call,
    "grammar process killed": _lose_checkers(signal.SIGKILL),
    "grammar process stopped": _lose_checkers(signal.SIGSTOP),
    "grammar process out of memory": _starve_checkers,
    "preparing process killed": _lose_preparing_process,
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


def describe(turns: list[tuple[list[float], int]]) -> dict[str, float]:
    """Return the middle and the 99th percentile of all turns together, and the number of requests."""
    took_s = [each for took_s, _ in turns for each in took_s]
    if len(took_s) < 2:
        return {"requests": len(took_s)}
    cuts = statistics.quantiles(took_s, n=100)
    return {"p50": round(1e3 * cuts[49], 1), "p99": round(1e3 * cuts[98], 1), "requests": len(took_s)}


def press(target: Target, name: str, seconds: float, end: Connection) -> None:
    """Send, whenever told to, requests of the kind `name` from several threads for so long; say what came of all.

    These take only CPU time that nobody else wants, as if they came from another machine.
    """
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    kind, asked = KINDS[name], Asked()
    kind(target, Asked())  # the first use of anything is in no figure
    end.send(None)

    def send(until_s: float) -> None:
        while time.monotonic() < until_s:
            kind(target, asked)

    while end.recv():
        senders = [threading.Thread(target=send, args=(time.monotonic() + seconds,)) for _ in range(NUM_SENDERS)]
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
        ours.send(False)
        process.join(WAIT_S)


def memory_mb(server: RunningServer) -> float:
    return float(round(psutil.Process(server.process.pid).memory_info().rss / 1e6, 1))


def run(server: RunningServer, seconds: float, name: str) -> tuple[dict[str, Any], bool]:
    """Press with one kind, calm before each turn of it; return the figures and whether all was well."""
    server.manager.on_submit = lambda submit: speak(server.manager, submit, _IDS * 16)
    target = Target(server.port, server.process.pid)
    calm, pressed, asked = [], [], Asked()
    num_failed = 0
    with plain_clients(server.port) as plain, hostile_clients(target, name, seconds / NUM_TURNS) as hostile:
        before_mb = memory_mb(server)
        for _ in range(NUM_TURNS):
            num_failed += measure(plain)[1]  # between two turns
            time.sleep(seconds / NUM_TURNS)
            calm.append(measure(plain))
            hostile.send(True)
            asked.statuses = hostile.recv()
            pressed.append(measure(plain))
        num_failed += sum(failed for _, failed in calm + pressed)
        figures = {
            "answers": dict(asked.statuses),
            "plain_ms": [describe(calm), describe(pressed)],
            "plain_failed": num_failed,
            "memory_mb": [before_mb, memory_mb(server)],
        }
    return figures, asked.is_clear and not num_failed


def main() -> int:
    """Run with the arguments of the command line."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 8.0
    report: dict[str, Any] = {}
    is_well = True
    for name in sys.argv[2:] or KINDS:
        with running_server(ensure_builtin(), access_log=False, log_level="ERROR") as server:
            report[name], was_well = run(server, seconds, name)
        is_well &= was_well
        print(name, json.dumps(report[name]), file=sys.stderr, flush=True)
    print(json.dumps(report))
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
