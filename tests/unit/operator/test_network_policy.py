"""spec.networkPolicy: the rules let in those who are named and what the product needs, and nobody else."""

from __future__ import annotations

from typing import Any

import pytest
from toka_operator.plan import make_plan
from toka_operator.settings import Settings
from toka_operator.spec import parse

from tests.unit.operator.examples import NOW, OWNER, body, child, nothing, plan_for, seen, valid

Json = dict[str, Any]
CLIENT = {"podSelector": {"matchLabels": {"app": "client"}}}
OWN = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "toka-engine", "app.kubernetes.io/instance": "chat",
                                       "app.kubernetes.io/component": "engine"}}}  # fmt: skip
OPERATOR = {
    "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "system"}},
    "podSelector": {"matchLabels": {"app.kubernetes.io/name": "toka-operator"}},
}
ENGINE_PORT = {"port": 10210, "protocol": "TCP"}


def ingress(reads_downloads: bool = False, **spec: Any) -> list[Json]:
    settings = Settings(engine_image="engine:1", namespace="system", reads_downloads=reads_downloads)
    plan = make_plan(OWNER, valid(**spec), nothing(), settings, NOW)
    rules: list[Json] = child(plan, "NetworkPolicy")["spec"]["ingress"]
    return rules


def test_with_nobody_named_nobody_is_let_in() -> None:
    assert ingress(networkPolicy={"mode": "Ingress"}) == []
    assert ingress(networkPolicy={"mode": "Ingress", "from": []}) == []


def test_the_operator_and_the_pods_themselves_are_let_in_where_the_product_needs_it() -> None:
    policy = {"mode": "Ingress", "from": [CLIENT]}
    named = {"from": [CLIENT], "ports": [ENGINE_PORT]}
    assert ingress(networkPolicy=policy) == [named]
    assert ingress(True, networkPolicy=policy) == [named, {"from": [OPERATOR], "ports": [ENGINE_PORT]}]
    assert ingress(networkPolicy=policy, rollout={"canary": {"seconds": 60}}) == ingress(True, networkPolicy=policy)
    with_data = ingress(True, networkPolicy=policy, data={"size": "1Gi"})
    assert with_data == [named, {"from": [OWN, OPERATOR], "ports": [ENGINE_PORT]}]


def test_those_who_are_named_reach_sidecars_and_the_product_the_engine_alone() -> None:
    proxy = {
        "name": "proxy",
        "image": "p",
        "ports": [{"containerPort": 8443}, {"containerPort": 53, "protocol": "UDP"}],
    }
    rules = ingress(True, networkPolicy={"mode": "Ingress", "from": [CLIENT]}, podTemplate={"sidecars": [proxy]})
    ports = [ENGINE_PORT, {"port": 8443, "protocol": "TCP"}, {"port": 53, "protocol": "UDP"}]
    assert rules == [{"from": [CLIENT], "ports": ports}, {"from": [OPERATOR], "ports": [ENGINE_PORT]}]


def test_while_a_port_changes_the_old_pods_stay_within_reach() -> None:
    before = plan_for(valid())
    policy = {"mode": "Ingress", "from": [CLIENT]}
    plan = plan_for(valid(networkPolicy=policy, engine={"port": 9000}), seen(before))
    (rule,) = child(plan, "NetworkPolicy")["spec"]["ingress"]
    assert {port["port"] for port in rule["ports"]} == {9000, 10210}


def test_the_policy_comes_before_the_pods_goes_with_the_mode_and_makes_no_revision() -> None:
    policy = {"mode": "Ingress"}
    plan = plan_for(valid(networkPolicy=policy))
    kinds = [each["kind"] for each in plan.desired]
    assert kinds.index("NetworkPolicy") < kinds.index("StatefulSet")
    off = plan_for(valid(), seen(plan))
    assert [(kind, name) for kind, name, _ in off.deletions] == [("NetworkPolicy", "chat")]
    assert valid(networkPolicy=policy).revision == valid().revision


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        ({"from": [CLIENT]}, "spec.networkPolicy.from"),
        ({"mode": "Ingress", "from": [{}]}, "spec.networkPolicy.from"),
        ({"mode": "Ingress", "from": [{"ipBlock": {"cidr": "10.0.0.0/8"}, **CLIENT}]}, "spec.networkPolicy.from"),
        (
            {"mode": "Ingress", "from": [{"podSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}]},
            "spec.networkPolicy.from",
        ),
        ({"mode": "Egress"}, "spec.networkPolicy.mode"),
    ],
)
def test_a_policy_without_meaning_is_refused(policy: Json, field: str) -> None:
    errors = parse(body(networkPolicy=policy))
    assert isinstance(errors, list)
    assert [error.path for error in errors] == [field]
