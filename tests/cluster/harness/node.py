"""One real node: kubelet, containerd and kube-proxy in a machine of its own, joined to the bridge.

Settings that differ from a usual node's have their reason beside them. When a node starts or dies is
decided by `cluster`.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tests.cluster.harness.control import FEATURE_GATES, SERVICE_RANGE
from tests.cluster.harness.errors import HarnessError
from tests.cluster.harness.paths import bin_folder, cluster_cache, tool
from tests.cluster.harness.pki import Pki
from tests.cluster.harness.processes import RunFolder, control_group_prefix
from tests.cluster.harness.trees import Machine, Network, add_bridge

BRIDGE_ADDRESS = "10.243.0.1"
REGISTRY = f"{BRIDGE_ADDRESS}:5000"
PAUSE_IMAGE = "localhost/pause:test"
_CGROUPS = Path("/sys/fs/cgroup")
_PROCESSES_OF_A_NODE = 6
"""A node's share of the processor, in processes: in a group of the usual share all its pods together would get no more
than each single process beside it."""


@dataclass(frozen=True, slots=True)
class NodeFiles:
    """A node's number, which gives its addresses, and its folder."""

    run: RunFolder
    number: int

    @property
    def name(self) -> str:
        """Its name in the cluster."""
        return f"node{self.number}"

    @property
    def folder(self) -> Path:
        """Everything of one life of the node; the images are elsewhere."""
        return self.run.path / self.name

    @property
    def address(self) -> str:
        """Its address on the bridge."""
        return f"10.243.0.{10 + self.number}"

    @property
    def pod_prefix(self) -> str:
        """The first three parts of its pods' addresses."""
        return f"10.244.{self.number}"

    @property
    def control_group(self) -> str:
        """Its own root, or one kubelet would clean up the other's pods."""
        return f"{control_group_prefix(self.run.name)}{self.name}"

    @property
    def containerd_socket(self) -> Path:
        """containerd's address."""
        return self.folder / "containerd.sock"


def start_node(run: RunFolder, number: int, num_nodes: int, control: Network, pki: Pki) -> Machine:
    """Boot a node, or boot it again after its death. It registers itself; readiness comes seconds later."""
    node = NodeFiles(run, number)
    shutil.rmtree(node.folder, ignore_errors=True)
    (node.folder / "cni").mkdir(parents=True)
    machine = Machine.create(run, node.name)
    names = [f"DNS:{node.name}", "IP:127.0.0.1", f"IP:{node.address}"]
    pki.issue(node.name, f"/O=system:nodes/CN=system:node:{node.name}", names)
    _connect(node, machine, control, num_nodes)
    make_control_group(node.control_group)
    _start_containerd(node, machine)
    _start_kubelet(node, machine, pki)
    _start_proxy(node, machine, pki)
    return machine


def _connect(node: NodeFiles, machine: Machine, control: Network, num_nodes: int) -> None:
    """Link the machine to the bridge; routes to the services and to the other nodes' pods."""
    link = ["link", "add", node.name, "type", "veth", "peer", "name", "eth0", "netns", str(machine.pid)]
    control.ip(*link)
    control.ip("link", "set", node.name, "master", "nodes", "up")
    machine.ip("addr", "add", f"{node.address}/24", "dev", "eth0")
    machine.ip("link", "set", "eth0", "up")
    add_bridge(machine, "toka0", f"{node.pod_prefix}.1/24")
    # kube-proxy rewrites service addresses, but the kernel looks for a route before that.
    machine.ip("route", "add", SERVICE_RANGE, "dev", "toka0")
    for other in range(1, num_nodes + 1):
        if other != node.number:
            machine.ip("route", "add", f"10.244.{other}.0/24", "via", f"10.243.0.{10 + other}")
    control.ip("route", "replace", f"{node.pod_prefix}.0/24", "via", node.address)
    machine.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.bridge.bridge-nf-call-iptables=1")


def make_control_group(name: str) -> None:
    """Make a node's root control group, in every hierarchy of version 1 or in the one of version 2."""
    if (_CGROUPS / "cgroup.controllers").exists():
        controllers = " ".join(f"+{each}" for each in (_CGROUPS / "cgroup.controllers").read_text().split())
        (_CGROUPS / "cgroup.subtree_control").write_text(controllers)
        (_CGROUPS / name).mkdir(exist_ok=True)
        (_CGROUPS / name / "cgroup.subtree_control").write_text(controllers)
        (_CGROUPS / name / "cpu.weight").write_text(str(100 * _PROCESSES_OF_A_NODE))
        return
    for hierarchy in _CGROUPS.iterdir():
        if hierarchy.is_dir() and not hierarchy.is_symlink() and os.access(hierarchy, os.W_OK):
            (hierarchy / name).mkdir(exist_ok=True)
    (_CGROUPS / "cpu" / name / "cpu.shares").write_text(str(1024 * _PROCESSES_OF_A_NODE))
    for setting in (
        "cpuset.cpus",
        "cpuset.mems",
    ):  # version 1 starts a cpuset empty, and then nothing may run
        (_CGROUPS / "cpuset" / name / setting).write_text((_CGROUPS / "cpuset" / setting).read_text())


def _take_image_store() -> tuple[Path, IO[str]]:
    """A folder for containerd's images that no running node uses, and the lock that says so.

    Stores outlive clusters, so that a 5 GB image is pulled once; containerd holds the lock while it lives. Those of
    containerd 1.6, which older versions of this harness run, lie elsewhere: it does not have to read what 2 wrote.
    """
    number = 1
    while True:
        store = cluster_cache() / "containerd2" / f"store{number}"
        store.mkdir(parents=True, exist_ok=True)
        lock = (store / ".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            number += 1
        else:
            return store, lock


def _start_containerd(node: NodeFiles, machine: Machine) -> None:
    hosts = node.folder / "hosts" / REGISTRY
    hosts.mkdir(parents=True)
    (hosts / "hosts.toml").write_text(
        f'server = "http://{REGISTRY}"\n[host."http://{REGISTRY}"]\n  capabilities = ["pull", "resolve"]\n'
    )
    (node.folder / "cni" / "10-toka.conflist").write_text(json.dumps(_pod_network(node)))
    store, lock = _take_image_store()
    configuration = node.folder / "containerd.toml"
    configuration.write_text(_containerd_configuration(node, store))
    argv = [*machine.enter(), tool("containerd"), "--config", str(configuration)]
    # Its shim is looked for in PATH, where that of an installed containerd may be: the one beside it has to come first.
    environment = os.environ | {"PATH": f"{bin_folder()}:{os.environ['PATH']}"}
    with lock:
        process = node.run.spawn(f"{node.name}.containerd", argv, environment, pass_fds=(lock.fileno(),))
    deadline = time.monotonic() + 60
    while not node.containerd_socket.exists():
        if not process.is_running() or time.monotonic() > deadline:
            raise HarnessError(f"containerd of {node.name} does not start:\n{process.log(4000)}")
        time.sleep(0.05)
    images = [tool("ctr"), "--address", str(node.containerd_socket), "--namespace", "k8s.io", "images"]
    machine.run(*images, "import", str(cluster_cache() / "images" / "pause.tar"))


def _containerd_configuration(node: NodeFiles, store: Path) -> str:
    """Without CAP_SYS_RESOURCE no process may lower its oom score; AppArmor may be absent; pods set no sysctls. The
    socket of NRI would be both nodes' one."""
    images, runtime = 'plugins."io.containerd.cri.v1.images"', 'plugins."io.containerd.cri.v1.runtime"'
    return f"""\
version = 3
root = "{store}"
state = "{node.folder}/state"
[grpc]
  address = "{node.containerd_socket}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{node.folder}/opt"
[plugins."io.containerd.nri.v1.nri"]
  disable = true
[{images}]
  discard_unpacked_layers = true
  use_local_image_pull = true
  [{images}.pinned_images]
    sandbox = "{PAUSE_IMAGE}"
  [{images}.registry]
    config_path = "{node.folder}/hosts"
[{runtime}]
  restrict_oom_score_adj = true
  disable_apparmor = true
  enable_unprivileged_ports = false
  enable_unprivileged_icmp = false
  [{runtime}.cni]
    bin_dirs = ["/usr/lib/cni"]
    conf_dir = "{node.folder}/cni"
"""


def _pod_network(node: NodeFiles) -> dict[str, object]:
    addresses = {"subnet": f"{node.pod_prefix}.0/24", "rangeStart": f"{node.pod_prefix}.10"}
    bridge = {
        "type": "bridge",
        "bridge": "toka0",
        "isGateway": True,
        "ipMasq": False,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "dataDir": str(node.folder / "ipam"),
            "ranges": [[addresses]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    port_map = {"type": "portmap", "capabilities": {"portMappings": True}}
    return {"cniVersion": "0.4.0", "name": "toka", "plugins": [bridge, port_map]}


def _start_kubelet(node: NodeFiles, machine: Machine, pki: Pki) -> None:
    configuration = node.folder / "kubelet.yaml"
    configuration.write_text(_kubelet_configuration(node, pki))
    argv = [
        tool("kubelet"),
        f"--config={configuration}",
        f"--kubeconfig={pki.file(node.name + '.kubeconfig')}",
        f"--hostname-override={node.name}",
        f"--node-ip={node.address}",
        f"--root-dir={node.folder}/kubelet",
        f"--cert-dir={node.folder}/certs",
    ]
    node.run.spawn(f"{node.name}.kubelet", [*machine.enter(), *argv], os.environ)


def _kubelet_configuration(node: NodeFiles, pki: Pki) -> str:
    """KubeletInUserNamespace tolerates refused sysctls and rlimits; low thresholds, for full disks. Pods are looked at
    every 10 s (a minute, unless told otherwise): so long may a changed Secret take to reach those that mount it."""
    return f"""\
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: 0.0.0.0
authentication:
  anonymous: {{enabled: false}}
  webhook: {{enabled: true}}
  x509: {{clientCAFile: {pki.file("ca.crt")}}}
authorization: {{mode: Webhook}}
tlsCertFile: {pki.file(node.name + ".crt")}
tlsPrivateKeyFile: {pki.file(node.name + ".key")}
containerRuntimeEndpoint: unix://{node.containerd_socket}
cgroupDriver: cgroupfs
cgroupRoot: /{node.control_group}
failCgroupV1: false
failSwapOn: false
enforceNodeAllocatable: []
featureGates: {{KubeletInUserNamespace: true, {FEATURE_GATES.replace("=", ": ").replace(",", ", ")}}}
evictionHard: {{memory.available: 100Mi, nodefs.available: "1%", imagefs.available: "1%"}}
imageGCHighThresholdPercent: 100
clusterDNS: ["{BRIDGE_ADDRESS}"]
clusterDomain: cluster.local
podLogsDir: {node.folder}/pods
volumePluginDir: {node.folder}/volumeplugins
maxPods: 200
serializeImagePulls: false
syncFrequency: 10s
nodeStatusUpdateFrequency: 5s
nodeLeaseDurationSeconds: 12
"""


def _start_proxy(node: NodeFiles, machine: Machine, pki: Pki) -> None:
    argv = [
        tool("kube-proxy"),
        f"--kubeconfig={pki.file('proxy.kubeconfig')}",
        f"--hostname-override={node.name}",
        "--proxy-mode=nftables",
        "--conntrack-max-per-core=0",  # the machine's own settings may not be changed from here
        "--conntrack-tcp-timeout-established=0",
        "--conntrack-tcp-timeout-close-wait=0",
        "--metrics-bind-address=127.0.0.1:10249",
        "--healthz-bind-address=127.0.0.1:10256",
    ]
    node.run.spawn(f"{node.name}.kube-proxy", [*machine.enter(), *argv], os.environ)
