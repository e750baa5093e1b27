"""spec.networkPolicy becomes a NetworkPolicy that follows the spec.

The test clusters' network plugin (bridge) enforces no NetworkPolicy: what is tested is the object that the API server
took, not that packets are dropped.
"""

from __future__ import annotations

from typing import Any

from tests.cluster.operating import SYSTEM, Operator

CLIENT = {"podSelector": {"matchLabels": {"app": "client"}}}
OFFICE = {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}
OPERATOR = {
    "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": SYSTEM}},
    "podSelector": {"matchLabels": {"app.kubernetes.io/name": "toka-operator"}},
}


def peers(operator: Operator) -> list[Any]:
    """All that may reach the pods, in order."""
    spec = (operator.get("networkpolicy", "chat") or {}).get("spec", {})
    return [peer for rule in spec.get("ingress", []) for peer in rule["from"]]


def test_a_policy_is_made_follows_the_spec_and_goes(without_operator: Operator) -> None:
    operator = without_operator
    operator.start(TOKA_READ_DOWNLOADS="true")
    operator.apply("chat", networkPolicy={"mode": "Ingress", "from": [CLIENT]})
    operator.wait_until_ready("chat")
    made = operator.require("networkpolicy", "chat")
    assert made["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/instance"] == "chat"
    assert made["spec"]["policyTypes"] == ["Ingress"]
    assert peers(operator) == [CLIENT, OPERATOR]
    (pod,) = operator.pods("chat")
    assert made["spec"]["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()

    operator.edit("networkpolicy", "chat", {"spec": {"ingress": [*made["spec"]["ingress"], {}]}})
    operator.wait_for(lambda: operator.require("networkpolicy", "chat")["spec"] == made["spec"], "the hole to close")
    operator.patch("chat", networkPolicy={"from": [CLIENT, OFFICE]})
    operator.wait_for(lambda: peers(operator) == [CLIENT, OFFICE, OPERATOR], "the other peer")
    operator.delete_and_wait("networkpolicy", "chat")
    operator.wait_for(lambda: peers(operator) == [CLIENT, OFFICE, OPERATOR], "the policy to come back")
    operator.patch("chat", networkPolicy={"from": None})
    operator.wait_for(lambda: peers(operator) == [OPERATOR], "only the operator to be let in")
    operator.patch("chat", networkPolicy=None)
    operator.wait_for(lambda: operator.get("networkpolicy", "chat") is None, "the policy to go")
    assert {each["metadata"]["uid"] for each in operator.pods("chat")} == {pod["metadata"]["uid"]}
    operator.stop()


def test_no_pod_is_made_while_the_policys_name_is_anothers(own_operator: Operator) -> None:
    operator = own_operator
    metadata = {"name": "chat", "namespace": operator.namespace}
    theirs = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata}
    operator.server.apply({**theirs, "spec": {"podSelector": {}, "ingress": [{}]}}, namespace=operator.namespace)
    operator.expected.append("event=name_taken")
    operator.apply("chat", networkPolicy={"mode": "Ingress"})
    taken = operator.wait_for_condition("chat", "Degraded", "True", "NameTaken")
    assert "NetworkPolicy chat" in taken["message"]
    assert operator.sets("chat") == {}
    operator.delete_and_wait("networkpolicy", "chat")
    operator.wait_until_ready("chat")
    assert operator.require("networkpolicy", "chat")["spec"].get("ingress", []) == []
