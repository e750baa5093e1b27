"""The command lines of a control plane's processes: pure functions of ports, addresses and keys."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.cluster.harness.paths import tool
from tests.cluster.harness.pki import Pki

FEATURE_GATES = "ImageVolume=true"
"""Off by default until Kubernetes 1.34."""
SERVICE_RANGE = "10.96.0.0/16"
SERVICE_NAMES = ["DNS:kubernetes", "DNS:kubernetes.default", "DNS:kubernetes.default.svc", "IP:10.96.0.1"]

# One line for each request when it is done: tests count an operator's reads and writes.
AUDIT_POLICY = """\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived, ResponseStarted]
rules:
- {level: None, users: ["system:apiserver", "system:kube-controller-manager", "system:kube-scheduler"]}
- {level: None, userGroups: ["system:nodes", "system:serviceaccounts:kube-system"]}
- {level: None, nonResourceURLs: ["/*"]}
- {level: Metadata}
"""


@dataclass(frozen=True, slots=True)
class ControlPlane:
    """The settings on which the processes of one control plane must agree."""

    folder: Path
    pki: Pki
    bind_address: str
    advertise_address: str | None
    api_port: int
    etcd_port: int
    etcd_peer_port: int
    admission: tuple[str, ...] = ()
    """Admission plugins besides those that Kubernetes enables."""
    feature_gates: str = FEATURE_GATES
    """The API server's, as name=true,name=false."""

    def etcd(self) -> list[str]:
        """etcd without fsync: the data need not survive the machine."""
        client, peer = f"http://127.0.0.1:{self.etcd_port}", f"http://127.0.0.1:{self.etcd_peer_port}"
        return [
            tool("etcd"),
            f"--data-dir={self.folder}/etcd",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",
            "--log-level=warn",
        ]

    def api_server(self) -> list[str]:
        """kube-apiserver with Node and RBAC authorisation, and an audit log."""
        pki = self.pki
        argv = [
            tool("kube-apiserver"),
            f"--etcd-servers=http://127.0.0.1:{self.etcd_port}",
            f"--service-cluster-ip-range={SERVICE_RANGE}",
            "--authorization-mode=Node,RBAC",
            f"--enable-admission-plugins={','.join(('NodeRestriction', *self.admission))}",
            f"--client-ca-file={pki.file('ca.crt')}",
            f"--tls-cert-file={pki.file('apiserver.crt')}",
            f"--tls-private-key-file={pki.file('apiserver.key')}",
            f"--secure-port={self.api_port}",
            f"--bind-address={self.bind_address}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={pki.file('sa.pub')}",
            f"--service-account-signing-key-file={pki.file('sa.key')}",
            f"--kubelet-client-certificate={pki.file('admin.crt')}",
            f"--kubelet-client-key={pki.file('admin.key')}",
            f"--kubelet-certificate-authority={pki.file('ca.crt')}",
            "--kubelet-preferred-address-types=InternalIP",
            f"--requestheader-client-ca-file={pki.file('front.crt')}",
            "--requestheader-username-headers=X-Remote-User",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            f"--proxy-client-cert-file={pki.file('aggregator.crt')}",
            f"--proxy-client-key-file={pki.file('aggregator.key')}",
            "--allow-privileged=true",
            f"--audit-policy-file={self.folder}/audit-policy.yaml",
            f"--audit-log-path={self.folder}/audit.log",
            f"--feature-gates={self.feature_gates}",
            "--max-requests-inflight=2000",
            "--max-mutating-requests-inflight=1000",
            "--shutdown-delay-duration=0s",
        ]
        if self.advertise_address is None:  # on loopback: the API server's own Service can have no endpoint
            return [*argv, "--endpoint-reconciler-type=none", "--advertise-address=127.0.0.1"]
        return [*argv, f"--advertise-address={self.advertise_address}"]

    def controller_manager(self, port: int) -> list[str]:
        """kube-controller-manager with client limits that do not slow tests of many objects."""
        return [
            tool("kube-controller-manager"),
            f"--kubeconfig={self.pki.file('kcm.kubeconfig')}",
            "--use-service-account-credentials",
            f"--service-account-private-key-file={self.pki.file('sa.key')}",
            f"--root-ca-file={self.pki.file('ca.crt')}",
            "--leader-elect=false",
            "--controllers=*,-nodeipam,-cloud-node-lifecycle",
            "--bind-address=127.0.0.1",
            f"--secure-port={port}",
            "--kube-api-qps=1000",
            "--kube-api-burst=2000",
            "--concurrent-statefulset-syncs=20",
            "--horizontal-pod-autoscaler-sync-period=1s",
        ]

    def scheduler(self, port: int) -> list[str]:
        """kube-scheduler."""
        configuration = self.folder / "scheduler.yaml"
        kubeconfig = self.pki.file("scheduler.kubeconfig")
        configuration.write_text(
            "apiVersion: kubescheduler.config.k8s.io/v1\nkind: KubeSchedulerConfiguration\n"
            "leaderElection: {leaderElect: false}\n"
            f"clientConnection: {{kubeconfig: {kubeconfig}, qps: 1000, burst: 2000}}\n"
        )
        argv = [tool("kube-scheduler"), f"--config={configuration}"]
        return [*argv, "--bind-address=127.0.0.1", f"--secure-port={port}"]

    def issue_component_keys(self) -> None:
        """Client certificates of the components that every control plane has."""
        self.pki.issue("kcm", "/CN=system:kube-controller-manager")
        self.pki.issue("scheduler", "/CN=system:kube-scheduler")
        (self.folder / "audit-policy.yaml").write_text(AUDIT_POLICY)
