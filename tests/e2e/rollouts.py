"""`python -m tests.e2e.rollouts [ROUNDS]`: rollouts under load, each with an engine killed and kube-proxy frozen.

Three replicas serve clients that stream through the Service. In each round the spec changes; right away an old engine
is killed, and when the first old pod is told to go, kube-proxy stands still on both nodes, so that new connections
still come to the pods that leave. Prints one JSON line, and ends with 1 if a request failed that no killed engine had.

Clients cannot see which pod they talk to. A failure is taken to be the killed engine's if the request was under way
when that died, or began before the Service had left it out; the kill and the frozen kube-proxy are kept apart.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from toka_engine.output import run_command

from tests.cluster.harness.cluster import Cluster
from tests.cluster.harness.errors import HarnessError
from tests.cluster.harness.handle import Object
from tests.cluster.harness.processes import ProcessHandle
from tests.e2e.installation import CLIENT_NAMESPACE, Deployment, Installation

REPLICAS = 3
LEFT_OUT_AFTER_S = 2.0
"""Seconds from when a dead engine's pod is unready until no node's kube-proxy sends anything there."""


@dataclass
class Seen:
    """Times (Unix) of what was done to the engines."""

    kills: list[tuple[float, float]] = field(default_factory=list)
    """The time of each engine's death, and the time from which the Service left it out."""
    freezes: list[tuple[float, float]] = field(default_factory=list)
    rounds: list[tuple[float, float]] = field(default_factory=list)


def is_of_killed(request: Object, seen: Seen) -> bool:
    """Whether a request can have failed because its engine was killed."""
    return any(killed <= request["ended"] and request["began"] <= left_out for killed, left_out in seen.kills)


def leaving(deployment: Deployment, names: set[str]) -> set[str]:
    pods = deployment.pods()
    here = {pod["metadata"]["name"] for pod in pods if "deletionTimestamp" not in pod["metadata"]}
    return names - here


def kill_engine(deployment: Deployment, pod: Object, seen: Seen) -> None:
    """SIGKILL the server of a pod's engine: every connection to it breaks. Return when no new one comes to it."""
    killed, name = time.time(), pod["metadata"]["name"]
    deployment.kill_process(pod, "toka_engine.server")

    def is_unready() -> bool:
        found = deployment.cluster.get("pod", name, deployment.namespace) or {}
        conditions = {c["type"]: c["status"] for c in found.get("status", {}).get("conditions", [])}
        return conditions.get("Ready") != "True"

    deployment.cluster.wait_for(is_unready, f"{name} to be unready")
    time.sleep(LEFT_OUT_AFTER_S)
    seen.kills.append((killed, time.time()))


def freeze_proxies(cluster: Cluster, seconds: float, seen: Seen) -> None:
    began = time.time()
    for number in cluster.nodes:
        cluster.signal_proxy(number, signal.SIGSTOP)
    time.sleep(seconds)
    for number in cluster.nodes:
        cluster.signal_proxy(number, signal.SIGCONT)
    seen.freezes.append((began, time.time()))


def roll(deployment: Deployment, number: int, freeze_s: float, seen: Seen) -> None:
    """One round, from a ready deployment to a ready one."""
    cluster, began = deployment.cluster, time.time()
    old = {pod["metadata"]["name"]: pod for pod in deployment.pods()}
    deployment.patch({"podTemplate": {"annotations": {"example.com/round": str(number)}}})
    kill_engine(deployment, old[max(old)], seen)
    cluster.wait_for(lambda: leaving(deployment, set(old)), "the first old pod to be told to go", 600.0, poll_s=0.3)
    if freeze_s:
        freeze_proxies(cluster, freeze_s, seen)
    deployment.wait_until_ready(1200.0)
    cluster.wait_for(
        lambda: not {*old} & {p["metadata"]["name"] for p in deployment.pods()}, "the old pods to end", 600.0
    )
    seen.rounds.append((began, time.time()))
    print(f"round {number}: {time.time() - began:.0f} s", file=sys.stderr, flush=True)


def wait_for_answers(cluster: Cluster, load: ProcessHandle, number: int) -> None:
    """Wait for so many answers. Raises HarnessError with what the clients wrote, if they ended."""

    def have_come() -> bool:
        if not load.is_running():
            raise HarnessError(f"the clients ended:\n{load.log()}")
        return load.log().count('"ended"') >= number

    cluster.wait_for(have_come, f"{number} answers", 600.0)


def stop_load(cluster: Cluster, load: ProcessHandle) -> list[Object]:
    """End the clients, which finish their streams, and return their requests."""
    lines = [json.loads(line) for line in load.log().splitlines()]
    end = f"import os, signal; os.kill({lines[0]['pid']}, signal.SIGTERM)"
    cluster.kubectl("exec", "--namespace", CLIENT_NAMESPACE, "client", "--", "python", "-c", end)
    cluster.wait_for(lambda: not load.is_running(), "the clients to finish", 600.0)
    return [json.loads(line) for line in load.log().splitlines()[1:]]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    cluster = Cluster.start(2, "rollouts")
    try:
        installation = Installation.install(cluster)
        namespace = installation.new_namespace("rollouts")
        spec: dict[str, Any] = {
            "replicas": REPLICAS,
            "resources": {"device": "cpu", "memory": "2Gi"},
            "engine": {"extraArgs": ["num_threads=1"], "kvCacheNumTokens": 16384},
            "rollout": {"drainDelaySeconds": arguments.drain_delay, "drainTimeoutSeconds": 300, "minReadySeconds": 2},
        }
        smollm2 = installation.deploy(namespace, **spec)
        smollm2.wait_until_ready(1200.0)
        seen = Seen()
        load = installation.start_client("load", "load.py", smollm2.url, str(arguments.clients), str(arguments.tokens))
        wait_for_answers(cluster, load, arguments.clients)
        for number in range(arguments.rounds):
            roll(smollm2, number, arguments.freeze, seen)
        requests = stop_load(cluster, load)
    finally:
        cluster.stop()
    failed = [request for request in requests if "error" in request]
    others = [request for request in failed if not is_of_killed(request, seen)]
    for request in others:
        print(json.dumps({**request, "freezes": seen.freezes, "kills": seen.kills}), file=sys.stderr)
    return {
        "rounds": arguments.rounds,
        "clients": arguments.clients,
        "tokens": arguments.tokens,
        "requests": len(requests),
        "failed_of_killed_engines": len(failed) - len(others),
        "failed_otherwise": len(others),
        "kube_proxy_frozen_s": arguments.freeze,
        "drain_delay_s": arguments.drain_delay,
        "seconds_a_round": round(sum(end - begin for begin, end in seen.rounds) / max(1, len(seen.rounds))),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.rollouts", description=__doc__)
    parser.add_argument("rounds", type=int, nargs="?", default=20)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each stream")
    parser.add_argument("--freeze", type=float, default=8.0, help="seconds that kube-proxy stands still in each round")
    parser.add_argument("--drain-delay", type=int, default=12, help="rollout.drainDelaySeconds: longer than that")
    found = measure(parser.parse_args())
    print(json.dumps(found))
    return 1 if found["failed_otherwise"] else 0


if __name__ == "__main__":
    run_command(main)
