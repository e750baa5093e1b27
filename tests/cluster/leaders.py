"""`python -m tests.cluster.leaders [TURNS]`: the leader is killed, or frozen, again and again; prints one JSON.

Two operators with the chart's own Lease settings serve a few objects, each of which is changed in every turn while
there is no leader. A frozen leader wakes up when another has led for a while, in the middle of whatever it did. Pods
are simulated, everything else is real. Each turn ends with a line of progress; one that is slow, with what the
operators asked for in it. Not a test: it asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import time
from datetime import UTC, datetime
from typing import Any

from toka_engine.output import run_command

from tests.cluster.harness.api_only import ApiServer
from tests.cluster.harness.processes import ProcessHandle
from tests.cluster.operating import SYSTEM, USER, Operator, install, start_operator
from tests.cluster.scale import AS_INSTALLED

NUM_OBJECTS = 5
WATCHES_LEASE_S = 5.0
"""Seconds that a new operator runs before the leader goes: by then it has seen the Lease renewed."""
SLOW_S = 20.0


def lease_holder(server: ApiServer) -> str:
    found = server.get("lease", "toka-operator", SYSTEM) or {}
    return str(found.get("spec", {}).get("holderIdentity") or "")


def is_done(operator: Operator, replicas: int) -> bool:
    """Whether every object has the status of its newest generation and as many pods as it asks for."""
    for found in operator.list("td"):
        name, status = found["metadata"]["name"], found.get("status", {})
        if status.get("observedGeneration") != found["metadata"]["generation"]:
            return False
        if [s["spec"]["replicas"] for s in operator.sets(name).values()] != [replicas]:
            return False
    return True


class Pair:
    """Two operators, of which one leads; whichever was ended is started again."""

    def __init__(self, operator: Operator) -> None:
        self._operator = operator
        self._num_started = 0
        self.running: dict[str, ProcessHandle] = {}

    def fill(self) -> None:
        while len(self.running) < 2:
            name = f"leader-{self._num_started}"
            self._num_started += 1
            server, kubeconfig = self._operator.server, self._operator.kubeconfig
            process = start_operator(server, kubeconfig, name, **AS_INSTALLED)
            server.wait_for(lambda process=process: "event=started" in process.log(), f"{name} to start")
            self.running[name] = process
            time.sleep(WATCHES_LEASE_S)

    def wait_for_leader(self, other_than: str = "") -> str:
        server = self._operator.server
        names = self.running.keys() - {other_than}
        found = server.wait_for(lambda: next((n for n in names if n == lease_holder(server)), None), "a leader")
        return str(found)


def tell_requests(operator: Operator, since: datetime) -> None:
    """Print what the operators asked for, but for watches."""
    for event in operator.server.audit_events(USER):
        begun, reference = event["requestReceivedTimestamp"], event.get("objectRef", {})
        if event["verb"] != "watch" and datetime.fromisoformat(begun) >= since:
            words = (event["verb"], reference.get("resource"), reference.get("name"), event["responseStatus"]["code"])
            print("  ", begun, event["stageTimestamp"], *words, file=sys.stderr, flush=True)


def measure(num_turns: int) -> dict[str, Any]:
    server = ApiServer.start("leaders")
    try:
        server.simulate_nodes(2)
        kubeconfig = install(server)
        namespace = server.create_namespace("leaders")
        operator = Operator(server, kubeconfig, namespace)
        return _take_turns(operator, num_turns)
    finally:
        server.stop()


def _take_turns(operator: Operator, num_turns: int) -> dict[str, Any]:
    pair = Pair(operator)
    pair.fill()
    pair.wait_for_leader()
    for number in range(NUM_OBJECTS):
        operator.apply(f"chat-{number}")
    operator.wait_for(lambda: is_done(operator, 1), "the beginning")
    takeovers: list[float] = []
    converged: list[float] = []
    wrong = 0
    for turn in range(num_turns):
        leader, replicas = pair.wait_for_leader(), 2 + turn % 2
        began, began_at = time.monotonic(), datetime.now(UTC)
        is_frozen = turn % 2 == 1
        pair.running[leader].send_signal(signal.SIGSTOP if is_frozen else signal.SIGKILL)
        for number in range(NUM_OBJECTS):
            operator.scale(f"chat-{number}", replicas)
        scaled_s = time.monotonic() - began
        pair.wait_for_leader(other_than=leader)
        takeovers.append(time.monotonic() - began)
        operator.wait_for(lambda replicas=replicas: is_done(operator, replicas), "the changes to be made")
        converged.append(time.monotonic() - began)
        told = f"turn {turn + 1}: scaled {scaled_s:.1f}, led {takeovers[-1]:.1f}, changed {converged[-1]:.1f} s"
        print(told, file=sys.stderr, flush=True)
        if converged[-1] > SLOW_S:
            tell_requests(operator, began_at)
        if is_frozen:
            pair.running[leader].send_signal(signal.SIGCONT)
            time.sleep(2.0)
            wrong += not is_done(operator, replicas)
            pair.running[leader].kill()
        del pair.running[leader]
        pair.fill()
    late = [e for e in operator.server.audit_events(USER) if e["responseStatus"]["code"] == 409]
    refused = [e for e in late if e["objectRef"]["resource"] not in ("leases", "tokadeployments")]
    return {
        "turns": num_turns,
        "objects": NUM_OBJECTS,
        "new_leader_s": {"median": round(statistics.median(takeovers), 1), "max": round(max(takeovers), 1)},
        "all_changes_made_s": {"median": round(statistics.median(converged), 1), "max": round(max(converged), 1)},
        "turns_in_which_a_woken_leader_changed_something": wrong,
        "writes_refused_as_out_of_date": len(refused),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("turns", nargs="?", type=int, default=50)
    print(json.dumps(measure(parser.parse_args().turns)))
    return 0


if __name__ == "__main__":
    run_command(main)
