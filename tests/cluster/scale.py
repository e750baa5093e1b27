"""`python -m tests.cluster.scale [OBJECTS]`: one operator and many TokaDeployments of two replicas; prints one JSON.

Pods are simulated (Ready as soon as they are bound), everything else is real: API server, controllers, scheduler,
the operator with the chart's rights. Writes are counted in the API server's audit log. The times are those that this
process sees through watches of its own, on the same cores as everything else. Not a test: it asserts nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import urllib3
from kubernetes import config
from toka_engine.output import run_command

from tests.cluster.harness.api_only import ApiServer
from tests.cluster.harness.processes import ProcessHandle
from tests.cluster.operating import PATHS, USER, WRITING_VERBS, deployment, install, start_operator

Json = dict[str, Any]
NAMESPACE = "scale"
REPLICAS = 2
QUIET_S = 30.0
AS_INSTALLED = {
    "TOKA_LEASE_DURATION_SECONDS": "10",
    "TOKA_LEASE_RENEW_DEADLINE_SECONDS": "7",
    "TOKA_LEASE_RETRY_SECONDS": "2",
}
"""The chart's defaults, where the tests' are shorter."""


class Seen:
    """The times at which this process saw each object's changes (monotonic seconds)."""

    def __init__(self) -> None:
        self.last_pod_ready: dict[str, float] = {}
        self.has_endpoints: dict[str, float] = {}
        self.is_ready: dict[str, float] = {}
        self.stateful_set: dict[str, float] = {}
        self._ready_pods: dict[str, set[str]] = defaultdict(set)

    def note_pod(self, pod: Json) -> None:
        conditions = pod.get("status", {}).get("conditions", [])
        if any(c["type"] == "Ready" and c["status"] == "True" for c in conditions):
            name = _instance(pod)
            self._ready_pods[name].add(pod["metadata"]["name"])
            if len(self._ready_pods[name]) == REPLICAS:
                self.last_pod_ready.setdefault(name, time.monotonic())

    def note_slice(self, endpoint_slice: Json) -> None:
        ready = [e for e in endpoint_slice.get("endpoints") or [] if e["conditions"].get("ready")]
        if len(ready) == REPLICAS:
            self.has_endpoints.setdefault(_instance(endpoint_slice), time.monotonic())

    def note_set(self, stateful_set: Json) -> None:
        self.stateful_set.setdefault(_instance(stateful_set), time.monotonic())

    def note_deployment(self, obj: Json) -> None:
        conditions = obj.get("status", {}).get("conditions", [])
        if any(c["type"] == "Ready" and c["status"] == "True" for c in conditions):
            self.is_ready.setdefault(obj["metadata"]["name"], time.monotonic())

    def delays(self) -> list[float]:
        """Seconds from the last pod's readiness and endpoint to Ready=True of each object."""
        both = self.is_ready.keys() & self.last_pod_ready.keys() & self.has_endpoints.keys()
        return sorted(self.is_ready[n] - max(self.last_pod_ready[n], self.has_endpoints[n]) for n in both)


def _instance(obj: Json) -> str:
    return str(obj["metadata"]["labels"]["app.kubernetes.io/instance"])


def measure(server: ApiServer, num_objects: int, min_ready_s: int, source: str | None = None) -> Json:
    """Runs it once on a fresh server. `source`: the source root of another version's operator."""
    environment = AS_INSTALLED | ({"PYTHONPATH": source} if source else {})
    server.simulate_nodes(4, pods_each=num_objects * REPLICAS)
    kubeconfig = install(server)
    server.create_namespace(NAMESPACE)
    api = config.new_client_from_config(str(server.kubeconfig))
    api.rest_client.pool_manager.connection_pool_kw["maxsize"] = 32
    seen = Seen()
    _watch(api, "pod", seen.note_pod)
    _watch(api, "endpointslice", seen.note_slice)
    _watch(api, "statefulset", seen.note_set)
    _watch(api, "td", seen.note_deployment)
    operator = start_operator(server, kubeconfig, "operator-0", **environment)
    server.wait_for(lambda: "held=True" in operator.log(), "the operator to lead")
    names = [f"chat-{i}" for i in range(num_objects)]
    began = time.monotonic()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda name: _create(api, name, min_ready_s), names))
    applied = time.monotonic()
    server.wait_for(lambda: len(seen.is_ready) == num_objects, "every object to be ready", 600.0, poll_s=0.5)
    time.sleep(5)
    writes = Counter(_written(server))
    answered_ms = _answered_ms(server)
    cpu_s = {each.name: round(_use(each)[0], 1) for each in server.run.processes.values()}
    before = len(_requests(server))
    time.sleep(QUIET_S)
    quiet = [r for r in _requests(server)[before:] if r[0] != "watch"]
    delays = seen.delays()
    return {
        "objects": num_objects,
        "replicas": REPLICAS,
        "min_ready_s": min_ready_s,
        "applied_in_s": round(applied - began, 1),
        "children_created_in_s": round(max(seen.stateful_set.values()) - began, 1),
        "all_ready_in_s": round(max(seen.is_ready.values()) - began, 1),
        "ready_seen_after_s": {
            "p50": round(statistics.median(delays), 2),
            "p99": round(delays[int(0.99 * (len(delays) - 1))], 2),
            "max": round(delays[-1], 2),
        },
        "writes_per_object": round(writes.total() / num_objects, 2),
        "writes": {key: round(count / num_objects, 2) for key, count in sorted(writes.items())},
        "quiet_s": QUIET_S,
        "requests_while_quiet": quiet,
        "writes_answered_after_ms": answered_ms,
        "cpu_s": cpu_s,
        "operator_mb": round(_use(operator)[1]),
        "restart_to_converged_s": round(_restart(server, kubeconfig, operator, api, names[-1], environment), 1),
    }


def _restart(
    server: ApiServer, kubeconfig: Path, operator: ProcessHandle, api: Any, name: str, environment: dict[str, str]
) -> float:
    """Seconds from the start of another operator until it has put back a Service deleted meanwhile."""
    operator.terminate()
    path = f"{PATHS['service'].format(NAMESPACE)}/{name}"
    _request(api, "DELETE", path)
    began = time.monotonic()
    start_operator(server, kubeconfig, "operator-1", **environment)
    server.wait_for(lambda: _request(api, "GET", path).status == 200, "the Service to be put back")
    return time.monotonic() - began


def _use(process: ProcessHandle) -> tuple[float, float]:
    """(CPU seconds, resident MB) of a process so far."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    status = Path(f"/proc/{process.pid}/status").read_text()
    resident_kb = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    return (int(fields[11]) + int(fields[12])) / 100, int(resident_kb) / 1024


def _requests(server: ApiServer) -> list[tuple[str, str]]:
    """(verb, resource) of each request of the operator, but those on its Lease."""
    found = [(e["verb"], e.get("objectRef", {})) for e in server.audit_events(USER)]
    named = [(verb, "/".join(filter(None, (ref.get("resource"), ref.get("subresource"))))) for verb, ref in found]
    return [(verb, resource) for verb, resource in named if resource != "leases"]


def _answered_ms(server: ApiServer) -> Json:
    """Mean and p99 of the milliseconds in which the API server answered each kind of the operator's writes."""
    found: dict[str, list[float]] = defaultdict(list)
    for event in server.audit_events(USER):
        resource = event.get("objectRef", {}).get("resource", "")
        if event["verb"] in WRITING_VERBS and resource != "leases":
            stamps = (event["stageTimestamp"], event["requestReceivedTimestamp"])
            ended, began = (datetime.fromisoformat(stamp).timestamp() for stamp in stamps)
            found[f"{event['verb']} {resource}"].append(1e3 * (ended - began))
    return {
        key: {"mean": round(statistics.mean(times)), "p99": round(sorted(times)[int(0.99 * (len(times) - 1))])}
        for key, times in sorted(found.items())
    }


def _written(server: ApiServer) -> list[str]:
    return [f"{verb} {resource}" for verb, resource in _requests(server) if verb in WRITING_VERBS]


def _request(api: Any, method: str, path: str, body: Json | None = None, **options: Any) -> Any:
    headers = {"Content-Type": "application/json"}
    verb, url, headers, *_ = api.param_serialize(
        method=method, resource_path=path, header_params=headers, auth_settings=[]
    )
    data = None if body is None else json.dumps(body).encode()
    return api.rest_client.pool_manager.request(verb, url, body=data, headers=headers, **options)


def _create(api: Any, name: str, min_ready_s: int) -> None:
    spec = {"model": {"source": "builtin://smollm2"}, "resources": {"device": "cpu"}, "replicas": REPLICAS}
    obj = deployment(name, **spec, rollout={"minReadySeconds": min_ready_s})
    answer = _request(api, "POST", PATHS["td"].format(NAMESPACE), obj)
    if answer.status != 201:
        raise SystemExit(f"{name} was not created: {answer.data[:500]!r}")


def _watch(api: Any, kind: str, note: Callable[[Json], None]) -> None:
    """Hands every object of a kind in the namespace to `note`, from a thread, for as long as the process runs."""
    path = f"{PATHS[kind].format(NAMESPACE)}?watch=true&timeoutSeconds=3600"

    def follow() -> None:
        buffer = b""
        with contextlib.suppress(urllib3.exceptions.HTTPError):  # the server was stopped
            for chunk in _request(api, "GET", path, preload_content=False).stream(amt=None):
                *lines, buffer = (buffer + chunk).split(b"\n")
                for line in lines:
                    note(json.loads(line)["object"])

    threading.Thread(target=follow, name=f"watch-{kind}", daemon=True).start()


def main() -> None:
    """Boots a server, measures, prints, ends everything."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.scale", description=__doc__)
    parser.add_argument("objects", type=int, nargs="?", default=1000)
    parser.add_argument("--min-ready", type=int, default=0, help="rollout.minReadySeconds of every object")
    parser.add_argument("--source", metavar="FOLDER", help="source root of another version's operator, to compare")
    arguments = parser.parse_args()
    server = ApiServer.start("scale")
    try:
        print(json.dumps(measure(server, arguments.objects, arguments.min_ready, arguments.source)))
    finally:
        server.stop()


if __name__ == "__main__":
    run_command(main)
