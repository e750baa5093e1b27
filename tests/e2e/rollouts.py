"""`python -m tests.e2e.rollouts [ROUNDS]`: rollouts under load, each with an engine killed and kube-proxy frozen.

Three replicas serve clients that stream through the Service. In each round the spec changes; right away an old engine
is killed, and when the first old pod that still serves is told to go, kube-proxy stands still on both nodes, so that
new connections still come to the pods that leave. Each round ends with a line of progress. Prints one JSON line, and
ends with 1 if a request failed that no killed engine had, or a round did not end: the rounds before it are told all
the same. Rounds may be shared out to several runs.

Clients cannot see which pod they talk to. A failure is taken to be the killed engine's if the request was under way
when that died, or began before the Service had left it out; the kill and the frozen kube-proxy are kept apart.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from toka_engine.output import run_command

from tests.cluster.harness.cluster import Cluster
from tests.cluster.harness.errors import HarnessError
from tests.cluster.harness.handle import Object
from tests.e2e.installation import CLIENT_NAMESPACE, Deployment, Installation
from tests.e2e.tiny_model import make_config_map, mount

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
    killed = max(old)
    kill_engine(deployment, old[killed], seen)
    serving = set(old) - {killed}
    cluster.wait_for(lambda: leaving(deployment, serving), "an old pod that serves to be told to go", 600.0, poll_s=0.3)
    if freeze_s:
        freeze_proxies(cluster, freeze_s, seen)
    deployment.wait_until_ready(1200.0)
    cluster.wait_for(
        lambda: not {*old} & {p["metadata"]["name"] for p in deployment.pods()}, "the old pods to end", 600.0
    )
    seen.rounds.append((began, time.time()))


class Load:
    """Clients that stream one completion after another, in the client pod."""

    def __init__(self, deployment: Deployment, arguments: argparse.Namespace) -> None:
        self._cluster = deployment.cluster
        words = map(str, (deployment.url, deployment.name, arguments.clients, arguments.tokens, arguments.pause))
        self._process = deployment.installation.start_client(f"load-{deployment.namespace}", "load.py", *words)

    def lines(self) -> list[Object]:
        """The whole lines that the clients have written."""
        text = self._process.log_file.read_text()
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def requests(self) -> list[Object]:
        """Those that have ended. Raises HarnessError with what the clients wrote, if they have ended themselves."""
        if not self._process.is_running():
            raise HarnessError(f"the clients ended:\n{self._process.log(4000)}")
        return [line for line in self.lines() if "began" in line]

    def stop(self) -> list[Object]:
        """End the clients, which finish their streams, and return all that they wrote."""
        end = f"import os, signal; os.kill({self.lines()[0]['pid']}, signal.SIGTERM)"
        self._cluster.kubectl("exec", "--namespace", CLIENT_NAMESPACE, "client", "--", "python", "-c", end)
        self._cluster.wait_for(lambda: not self._process.is_running(), "the clients to finish", 600.0)
        return self.lines()


def deploy(installation: Installation, model: str, drain_delay_s: int, replicas: int = REPLICAS) -> Deployment:
    """Replicas of the model in the image, or of the random one, which costs next to no computing."""
    namespace = installation.new_namespace("rollouts")
    spec: dict[str, Any] = {
        "replicas": replicas,
        "resources": {"device": "cpu", "memory": "2Gi"},
        "engine": {"extraArgs": ["num_threads=1"], "kvCacheNumTokens": 16384},
        "rollout": {"drainDelaySeconds": drain_delay_s, "drainTimeoutSeconds": 300, "minReadySeconds": 2},
    }
    if model == "tiny":
        with tempfile.TemporaryDirectory() as folder:
            files = make_config_map(Path(folder), "tiny")
        installation.cluster.apply(files, namespace=namespace)
        spec |= {"model": {"source": "file:///tiny", "dtype": "float32"}, "podTemplate": mount(files, "/tiny")}
    deployment = installation.deploy(namespace, model, **spec)
    deployment.wait_until_ready(1200.0)
    return deployment


def take_rounds(deployment: Deployment, arguments: argparse.Namespace, seen: Seen) -> list[Object]:
    """Roll as often as asked for, or until a round does not end, and return all that the clients wrote."""
    load = Load(deployment, arguments)
    cluster = deployment.cluster
    cluster.wait_for(lambda: len(load.requests()) >= arguments.clients, "an answer for each client", 600.0)
    try:
        for number in range(arguments.rounds):
            roll(deployment, number, arguments.freeze, seen)
            began, ended = seen.rounds[-1]
            requests = load.requests()
            others = sum("error" in each and not is_of_killed(each, seen) for each in requests)
            told = (
                f"round {number + 1}: {ended - began:.0f} s, {len(requests)} requests so far, {others} failed otherwise"
            )
            print(told, file=sys.stderr, flush=True)
    except HarnessError as error:
        print(f"round {len(seen.rounds) + 1} did not end: {error}", file=sys.stderr, flush=True)
    return load.stop()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    seen = Seen()
    cluster = Cluster.start(2, "rollouts")
    try:
        deployment = deploy(Installation.install(cluster), arguments.model, arguments.drain_delay)
        lines = take_rounds(deployment, arguments, seen)
    finally:
        cluster.stop()
    requests = [line for line in lines if "began" in line]
    stalls = [line for line in lines if "stalled_s" in line]
    failed = [request for request in requests if "error" in request]
    others = [request for request in failed if not is_of_killed(request, seen)]
    for request in others:
        print(json.dumps({**request, "freezes": seen.freezes, "kills": seen.kills, "stalls": stalls}), file=sys.stderr)
    return {
        "rounds": len(seen.rounds),
        "model": arguments.model,
        "clients": arguments.clients,
        "tokens": arguments.tokens,
        "requests": len(requests),
        "failed_of_killed_engines": len(failed) - len(others),
        "failed_otherwise": len(others),
        "kube_proxy_frozen_s": arguments.freeze,
        "drain_delay_s": arguments.drain_delay,
        "clients_stalled_s": round(sum(line["stalled_s"] for line in stalls), 1),
        "seconds_a_round": round(sum(end - begin for begin, end in seen.rounds) / max(1, len(seen.rounds))),
    }


def _stop(number: int, frame: object) -> NoReturn:
    """End on SIGTERM as when a round does not end: the rounds before are told, and the cluster ends."""
    raise HarnessError("this run was told to end")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.rollouts", description=__doc__)
    parser.add_argument("rounds", type=int, nargs="?", default=20)
    parser.add_argument("--model", choices=["tiny", "smollm2"], default="tiny")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each stream")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds of each client between two streams")
    parser.add_argument("--freeze", type=float, default=8.0, help="seconds that kube-proxy stands still in each round")
    parser.add_argument("--drain-delay", type=int, default=12, help="rollout.drainDelaySeconds: longer than that")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)
    found = measure(arguments)
    print(json.dumps(found))
    return 1 if found["failed_otherwise"] or found["rounds"] < arguments.rounds else 0


if __name__ == "__main__":
    run_command(main)
