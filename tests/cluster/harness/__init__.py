"""A real Kubernetes on one machine, for tests and for the quickstart.

Two things can be booted, both from the commands pinned in `tools/*/go.mod`:

* `ApiServer` (fixture `api_server`): etcd, kube-apiserver and controller-manager on free loopback ports,
  about four seconds; optionally simulated nodes (kwok) whose pods become Ready. For tests of the operator.
* `Cluster` (fixtures `cluster`, `two_node_cluster`): the same control plane, scheduler, DNS, a registry and
  one or two nodes with kubelet, containerd and kube-proxy, each in its own namespaces. For e2e tests.

Both are `KubernetesHandle`s: `kubectl`, `get`, `apply`, `wait_for`, `spawn_python`, `restart_api_server`,
`audit_events`. Nothing here imports the operator or the engine.
"""
