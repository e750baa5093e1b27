"""A real cluster on one machine: control plane, DNS, image registry, and one or two nodes that run pods.

The control plane has a network of its own (our files, our pids), each node a machine of its own (`trees`). No
traffic can leave. Never send a request for a pod's or a service's address from outside: use `run_in_node`, a
pod, or `spawn` (which reaches pods, but not service addresses).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.harness.control import SERVICE_NAMES, ControlPlane
from tests.cluster.harness.errors import HarnessError
from tests.cluster.harness.handle import KubernetesHandle, Object
from tests.cluster.harness.images import buildah, ensure_pause_image
from tests.cluster.harness.node import BRIDGE_ADDRESS, REGISTRY, start_node
from tests.cluster.harness.paths import cluster_cache, tool
from tests.cluster.harness.pki import Pki
from tests.cluster.harness.processes import RunFolder
from tests.cluster.harness.tools import require_tools
from tests.cluster.harness.trees import Machine, Network, add_bridge, run_checked

# Half a minute sooner than Kubernetes' default, with kubelets that renew their leases often (see `node`).
_LOST_AFTER = "--node-monitor-grace-period=20s"


class Cluster(KubernetesHandle):
    """A running cluster. `nodes` holds the machines of the nodes that live, by number from 1."""

    def __init__(self, run: RunFolder, control: ControlPlane, network: Network, num_nodes: int) -> None:
        super().__init__(run, control)
        self.network = network
        self.num_nodes = num_nodes
        self.nodes: dict[int, Machine] = {}

    @classmethod
    def start(cls, num_nodes: int = 1, name: str | None = None, *, is_kept: bool = False) -> Cluster:
        """Boot one with all nodes Ready. A kept cluster outlives this process until its `stop`."""
        require_tools("etcd", "kubernetes", "addons", "registry", "containerd")
        ensure_pause_image()
        run = RunFolder(name or f"cluster{num_nodes}-{os.getpid()}", is_kept=is_kept)
        run.create()
        pki = Pki(run.path / "pki", f"https://{BRIDGE_ADDRESS}:6443")
        pki.create([*SERVICE_NAMES, "DNS:localhost", "IP:127.0.0.1", f"IP:{BRIDGE_ADDRESS}"])
        pki.issue("proxy", "/CN=system:kube-proxy")
        control = _control_plane(run, pki)
        control.issue_component_keys()
        cluster = cls(run, control, Network.create(run, "control"), num_nodes)
        try:
            cluster._start_control_plane()
            for number in range(1, num_nodes + 1):
                cluster.start_node(number)
            for number in range(1, num_nodes + 1):
                cluster.wait_for_node(number)
        except BaseException:
            cluster.stop()
            raise
        return cluster

    @classmethod
    def attach(cls, name: str) -> Cluster:
        """A handle for a kept cluster of another process; raises `HarnessError` if it is not running."""
        run = RunFolder(name, is_kept=True)
        pids = dict(run.recorded())
        if "control" not in pids:
            raise HarnessError(f"no cluster named {name} is running")
        pki = Pki(run.path / "pki", f"https://{BRIDGE_ADDRESS}:6443")
        numbers = [int(each[4:-6]) for each in pids if each.startswith("node") and each.endswith(".first")]
        cluster = cls(run, _control_plane(run, pki), Network("control", pids["control"]), len(numbers))
        cluster.nodes = {number: Machine(f"node{number}", pids[f"node{number}.first"]) for number in numbers}
        return cluster

    def enter_network(self) -> list[str]:
        return self.network.enter()

    def _start_control_plane(self) -> None:
        add_bridge(self.network, "nodes", f"{BRIDGE_ADDRESS}/24")
        run_checked([*self.network.enter(), "sysctl", "-qw", "net.ipv4.ip_forward=1"])
        self.spawn_control("etcd", self.control.etcd())
        self.spawn_control("registry", [tool("registry"), "serve", self._registry_configuration()])
        self.start_api_server()
        self.spawn_control("kube-controller-manager", [*self.control.controller_manager(10257), _LOST_AFTER])
        self.spawn_control("kube-scheduler", self.control.scheduler(10259))
        self.spawn_control("coredns", [tool("coredns"), "-conf", self._dns_configuration()])

    def _registry_configuration(self) -> str:
        """Blobs outlive clusters: what was pushed once is there for the next."""
        configuration = {
            "version": "0.1",
            "log": {"level": "error"},
            "storage": {"filesystem": {"rootdirectory": str(cluster_cache() / "registry")}},
            "http": {"addr": REGISTRY},
        }
        file = self.run.path / "registry.json"  # JSON is YAML
        file.write_text(json.dumps(configuration))
        return str(file)

    def _dns_configuration(self) -> str:
        file = self.run.path / "Corefile"
        file.write_text(
            f".:53 {{\n bind {BRIDGE_ADDRESS}\n errors\n kubernetes cluster.local in-addr.arpa ip6.arpa {{\n"
            f"  kubeconfig {self.kubeconfig} c\n  ttl 1\n }}\n cache 1\n}}\n"
        )
        return str(file)

    # ---- nodes

    def start_node(self, number: int) -> None:
        """Boot a node, also one that was killed; `wait_for_node` waits until it is Ready."""
        self.nodes[number] = start_node(self.run, number, self.num_nodes, self.network, self.control.pki)

    def wait_for_node(self, number: int, *, is_ready: bool = True, timeout_s: float = 90.0) -> None:
        """Wait until a node is Ready, or until the cluster has noticed that it is not."""
        wanted = ("True",) if is_ready else ("False", "Unknown")

        def has_state() -> bool:
            conditions = (self.get("node", f"node{number}") or {}).get("status", {}).get("conditions", [])
            return any(each["type"] == "Ready" and each["status"] in wanted for each in conditions)

        state = "Ready" if is_ready else "seen as lost"
        self.wait_for(has_state, f"node{number} to be {state}", timeout_s)

    def kill_node(self, number: int) -> None:
        """End a node at once, as by a power cut: its processes, pods, mounts and addresses are gone."""
        del self.nodes[number]
        self.run.kill_recorded(f"node{number}")

    def signal_proxy(self, number: int, signal_number: int) -> None:
        """Signal a node's kube-proxy: stopped, it stands still, and the node's Services go on as they are.

        Its process is the child of the one that entered the machine.
        """
        entered = self.run.processes[f"node{number}.kube-proxy"].pid
        (child,) = Path(f"/proc/{entered}/task/{entered}/children").read_text().split()
        os.kill(int(child), signal_number)

    def run_in_node(self, number: int, argv: Sequence[str], timeout_s: float = 60.0) -> str:
        """Run a command inside a node's machine, where pods and services can be reached."""
        return run_checked([*self.nodes[number].enter(), *argv], timeout_s=timeout_s)

    def give_gpus(self, number: int, count: int) -> None:
        """Let a node claim GPUs for the scheduler; pods that ask for one run, on the CPU."""
        patch = [
            {"op": "add", "path": f"/status/{field}/nvidia.com~1gpu", "value": str(count)}
            for field in ("capacity", "allocatable")
        ]
        name = f"node{number}"
        self.kubectl("patch", "node", name, "--subresource=status", "--type=json", "-p", json.dumps(patch))

    # ---- images

    def push_image(self, image: str) -> str:
        """Push a local image to the cluster's registry; returns the name by which pods pull it.

        The tag is the image's own id: a node that has an older build must not take it for this one.
        """
        inspect = buildah("inspect", "--type", "image", "--format", "{{.FromImageID}}", image)
        image_id = run_checked(inspect).strip()
        repository = image.removeprefix("localhost/").rpartition(":")[0]
        reference = f"{REGISTRY}/{repository}:{image_id[:12]}"
        compression = ["--compression-format", "zstd", "--compression-level", "1"]
        argv = buildah("push", "-q", "--tls-verify=false", *compression, image, f"docker://{reference}")
        run_checked([*self.network.enter(), *argv], timeout_s=900)
        return reference

    def pull_image(self, reference: str) -> None:
        """Bring a pushed image to every living node at once, so that what follows does not wait for it."""
        names = [f"pull-{number}" for number in self.nodes]
        self.apply(*(_pull_pod(f"pull-{number}", f"node{number}", reference) for number in self.nodes))
        done = ["wait", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=600s"]
        self.kubectl(*done, *(f"pod/{name}" for name in names), timeout_s=620)
        self.kubectl("delete", "pod", *names)


def _control_plane(run: RunFolder, pki: Pki) -> ControlPlane:
    return ControlPlane(run.path, pki, "0.0.0.0", BRIDGE_ADDRESS, 6443, 2379, 2380)


def _pull_pod(name: str, node: str, image: str) -> Object:
    """A pod whose start is all that is wanted of it."""
    container = {"name": "pull", "image": image, "command": ["true"]}
    spec = {"nodeName": node, "restartPolicy": "Never", "containers": [container]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
