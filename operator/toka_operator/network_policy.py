"""spec.networkPolicy: who may reach the engine pods.

Owns: the fields, and the rules of a NetworkPolicy. Pure. Probes need no rule: the kubelet's come from the pod's own
node, which no NetworkPolicy may shut out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from toka_operator.fields import Fields, Json

NETWORK_POLICY_DEFAULTS: Json = {"mode": "Off"}
_OPERATOR_LABELS = {"app.kubernetes.io/name": "toka-operator"}
"""Labels of the operator's pods, as the chart gives them."""


@dataclass(frozen=True, slots=True)
class NetworkPolicy:
    """The policy that a spec asks for."""

    is_ingress: bool
    """Whether nobody may reach the pods but those who are named."""
    peers: tuple[Json, ...]
    """The named ones, as NetworkPolicyPeers of the Kubernetes API."""


def parse_network_policy(fields: Fields) -> NetworkPolicy:
    """The policy that a spec asks for."""
    is_ingress = fields.choice("mode", ("Off", "Ingress")) == "Ingress"
    peers = fields.items("from", dict)
    if peers and not is_ingress:
        fields.refuse("from", "is only for mode Ingress")
    if any(("ipBlock" in peer) == ("podSelector" in peer or "namespaceSelector" in peer) for peer in peers):
        fields.refuse("from", "entries need an ipBlock, or a podSelector, a namespaceSelector or both")
    selectors = [peer[name] for peer in peers for name in ("podSelector", "namespaceSelector") if peer.get(name)]
    expressions = [each for found in selectors for each in found.get("matchExpressions") or []]
    if any((each.get("operator") in ("In", "NotIn")) != bool(each.get("values")) for each in expressions):
        fields.refuse("from", "matchExpressions need values with operator In or NotIn, and none with the others")
    return NetworkPolicy(is_ingress, peers)


def render_ingress(
    policy: NetworkPolicy, pods: Iterable[Json], siblings: Json | None, operator_namespace: str | None
) -> list[Json]:
    """The rules of ingress: the named peers reach every port that a container of the pods declares, the product itself
    the engine's.

    `pods`: the pod templates of all live revisions, the first container of each being the engine. `siblings`: labels of
    the object's pods, where they ask each other for batches. `operator_namespace`: where the operator's pods are, if
    they ask engines.
    """
    containers = [pod["spec"]["containers"] for pod in pods]
    own: list[Json] = []
    if siblings is not None:
        own.append({"podSelector": {"matchLabels": siblings}})
    if operator_namespace is not None:
        namespace = {"matchLabels": {"kubernetes.io/metadata.name": operator_namespace}}
        own.append({"namespaceSelector": namespace, "podSelector": {"matchLabels": _OPERATOR_LABELS}})
    rules = [
        (policy.peers, _ports(container for each in containers for container in each)),
        (own, _ports(each[0] for each in containers)),
    ]
    # A rule without peers would let everybody in.
    return [{"from": list(peers), "ports": ports} for peers, ports in rules if peers and ports]


def _ports(containers: Iterable[Json]) -> list[Json]:
    """Every declared port, once. Numbers and not names, which not every network plugin resolves."""
    declared = [port for container in containers for port in container.get("ports") or []]
    found = {(port.get("protocol") or "TCP", port["containerPort"]) for port in declared if "containerPort" in port}
    return [{"port": number, "protocol": protocol} for protocol, number in sorted(found, key=str)]
