"""Engines in place of those of simulated pods: they answer at /metrics, on this machine, with an engine's own text.

The pods are held (`HOLD`), so that their status is what `SimulatedEngines` says: running, ready, with an address of the
loopback network. A Service cannot have such addresses, so the test makes its EndpointSlice as well. Only the operator,
which runs on this machine, ever asks there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from toka_engine.server.metrics import CONTENT_TYPE, Metrics
from toka_engine.server.replicas import Replicas

from tests.cluster.harness.api_only import free_ports
from tests.cluster.operating import HOLD, Json, Operator

CANARY_S = 6
_STATUSES = {True: "200", False: "500"}


class SimulatedEngine:
    """One engine, its address and what it has counted."""

    def __init__(self, address: str, port: int) -> None:
        self.metrics = Metrics(lambda: True, lambda: 0, Replicas([lambda message: None], block_tokens=16))
        self.num_asked = 0
        engine = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                engine.num_asked += 1
                self.send_response(200)
                self.send_header("content-type", CONTENT_TYPE)
                self.end_headers()
                self.wfile.write(engine.metrics.render())

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        self.address = address
        self._server = ThreadingHTTPServer((address, port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        self._thread.start()

    def answer(self, first_token_s: float, is_well: bool) -> None:
        """Count one streamed request."""
        self.metrics.requests.labels("chat", _STATUSES[is_well]).inc()
        if is_well:
            self.metrics.first_token_seconds.observe(first_token_s)

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class SimulatedEngines(threading.Thread):
    """A kubelet for the pods of `chat`: each has an engine as soon as it has a node, and requests as long as `traffic`
    is set."""

    def __init__(self, operator: Operator) -> None:
        super().__init__(name="simulated-engines", daemon=True)
        self.port, self.other_port = free_ports(2)
        self.by_pod: dict[str, SimulatedEngine] = {}
        """By uid of a pod."""
        self.traffic = True
        self.first_token_s: dict[str, float] = {}
        """By an argument of the engine: how long a first token takes; else 0.05 s."""
        self.fails: set[str] = set()
        """Arguments of engines all of whose requests fail."""
        self._operator = operator
        self._addresses = (f"127.0.77.{n}" for n in range(1, 255))
        self._is_over = threading.Event()

    def run(self) -> None:
        while not self._is_over.wait(0.2):
            pods = [pod for pod in self._operator.pods("chat") if pod["spec"].get("nodeName")]
            for pod in pods:
                if pod["metadata"]["uid"] not in self.by_pod and "deletionTimestamp" not in pod["metadata"]:
                    self._start(pod)
            known = {pod["metadata"]["uid"]: pod for pod in pods}
            self._tell_endpoints([known[uid] for uid in self.by_pod if uid in known])
            for uid, engine in self.by_pod.items():
                if uid in known and self.traffic:
                    self._send(engine, known[uid]["spec"]["containers"][0]["args"])

    def stop(self) -> None:
        self._is_over.set()
        self.join()
        for engine in self.by_pod.values():
            engine.stop()

    def _start(self, pod: Json) -> None:
        address = next(self._addresses)
        port = next(each["ports"][0]["containerPort"] for each in pod["spec"]["containers"] if each["name"] == "engine")
        self.by_pod[pod["metadata"]["uid"]] = SimulatedEngine(address, port)
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        conditions = [{"type": t, "status": "True", "lastTransitionTime": now} for t in ("Ready", "ContainersReady")]
        names = [each["name"] for each in pod["spec"]["containers"]]
        running = {"image": "engine:1", "imageID": "engine:1", "ready": True, "restartCount": 0, "started": True}
        containers = [{**running, "name": name, "state": {"running": {"startedAt": now}}} for name in names]
        self._operator.set_pod_status(
            pod["metadata"]["name"],
            phase="Running",
            podIP=address,
            podIPs=[{"ip": address}],
            startTime=now,
            conditions=conditions,
            containerStatuses=containers,
        )

    def _tell_endpoints(self, pods: list[Json]) -> None:
        names = [pod["metadata"]["name"] for pod in pods if "deletionTimestamp" not in pod["metadata"]]
        labels = {"kubernetes.io/service-name": "chat", "app.kubernetes.io/instance": "chat"}
        labels |= {"app.kubernetes.io/managed-by": "toka-operator"}  # the Service's, as its controller copies them
        endpoints = [
            {
                "addresses": [f"192.0.2.{number}"],
                "conditions": {"ready": True},
                "targetRef": {"kind": "Pod", "name": name},
            }
            for number, name in enumerate(names, 1)
        ]
        manifest = {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": "chat-simulated", "labels": labels},
            "addressType": "IPv4",
            "endpoints": endpoints,
        }
        self._operator.server.request(
            "PATCH",
            f"/apis/discovery.k8s.io/v1/namespaces/{self._operator.namespace}/endpointslices/chat-simulated"
            "?fieldManager=test&force=true",
            manifest,
            "apply-patch+yaml",
        )

    def _send(self, engine: SimulatedEngine, arguments: list[str]) -> None:
        seconds = next((self.first_token_s[each] for each in arguments if each in self.first_token_s), 0.04)
        for _ in range(4):
            engine.answer(seconds, is_well=self.fails.isdisjoint(arguments))


@contextmanager
def simulate_engines(operator: Operator) -> Iterator[SimulatedEngines]:
    """Engines for the pods of `chat`."""
    engines = SimulatedEngines(operator)
    operator.num_edits = 40  # each answer of an engine asks for a pass
    engines.start()
    try:
        yield engines
    finally:
        engines.stop()


def begin(operator: Operator, engines: SimulatedEngines, replicas: int = 2, **rollout: Any) -> str:
    """An object that is ready, whose next rollout has a canary. Returns its revision."""
    rollout = {"canary": {"seconds": CANARY_S}, **rollout}
    operator.apply("chat", replicas=replicas, engine={"port": engines.port}, rollout=rollout, **HOLD)
    return str(operator.wait_until_ready("chat")["status"]["currentRevision"])


def canary_of(operator: Operator) -> Json:
    return dict(operator.require("td", "chat")["status"].get("canary", {}))


def wait_for_phase(operator: Operator, phase: str) -> Json:
    found: Json = operator.wait_for(
        lambda: canary_of(operator) if canary_of(operator).get("phase") == phase else None, f"a canary that is {phase}"
    )
    return found
