"""spec.routing: which pool and which route it makes, and what its condition says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from toka_operator.errors import FieldError
from toka_operator.observed import Observed, PodView
from toka_operator.plan import Plan
from toka_operator.routing import explain_routed
from toka_operator.sight import KNOWN, NOT_ALLOWED, UNKNOWN
from toka_operator.spec import TokaDeploymentSpec, parse

from tests.unit.operator.examples import body, child, nothing, plan_for, pod, seen, valid

Json = dict[str, Any]
POOL = {"inferencePool": {"endpointPickerRef": {"name": "picker"}}}
ROUTE = {"httpRoute": {"parentRefs": [{"name": "web", "namespace": "edge"}], "hostnames": ["chat.example.com"]}}
SEEN = {"InferencePool": KNOWN, "HTTPRoute": KNOWN}


def kinds(plan: Plan) -> set[str]:
    return {each["kind"] for each in plan.desired}


def see(spec: TokaDeploymentSpec, pods: tuple[PodView, ...] = (), **sights: str) -> Observed:
    """The children of a spec as observed once they were made where the cluster has both kinds, or `sights`."""
    known = {**SEEN, **sights}
    return replace(seen(plan_for(spec, replace(nothing(), sights=known)), pods), sights=known)


def backend(plan: Plan) -> Json:
    (rule,) = child(plan, "HTTPRoute")["spec"]["rules"]
    (found,) = rule["backendRefs"]
    return dict(found)


@pytest.mark.parametrize("sight", [KNOWN, UNKNOWN, NOT_ALLOWED])
def test_pool_and_route_are_made_where_they_are_asked_for_and_can_be_seen(sight: str) -> None:
    both = {"InferencePool", "HTTPRoute"}
    observed = replace(nothing(), sights=dict.fromkeys(both, sight))
    assert kinds(plan_for(valid(), observed)).isdisjoint(both)
    found = kinds(plan_for(valid(routing={**POOL, **ROUTE}), observed)) & both
    assert found == (both if sight == KNOWN else set())


def test_the_pool_selects_the_pods_as_the_service_does() -> None:
    plan = plan_for(valid(routing=POOL, engine={"port": 9000}), replace(nothing(), sights=SEEN))
    pool = child(plan, "InferencePool")
    assert pool["apiVersion"] == "inference.networking.k8s.io/v1"
    assert pool["spec"]["selector"]["matchLabels"] == child(plan, "Service")["spec"]["selector"]
    assert pool["spec"]["targetPorts"] == [{"number": 9000}]
    reference = {"kind": "Service", "name": "picker", "port": {"number": 9002}, "failureMode": "FailClose"}
    assert pool["spec"]["endpointPickerRef"] == reference


def test_the_route_goes_to_the_service_until_there_is_a_pool_of_ours() -> None:
    spec = valid(routing={**POOL, **ROUTE}, service={"port": 8080})
    first = plan_for(spec, replace(nothing(), sights=SEEN))
    assert backend(first) == {"group": "", "kind": "Service", "name": "chat", "port": 8080, "weight": 1}
    route = child(first, "HTTPRoute")["spec"]
    assert route["hostnames"] == ["chat.example.com"]
    gateway = {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "web", "namespace": "edge"}
    assert route["parentRefs"] == [gateway]

    pooled = backend(plan_for(spec, see(spec)))
    assert (pooled["kind"], pooled["name"]) == ("InferencePool", "chat")
    assert backend(plan_for(spec, see(spec, InferencePool=UNKNOWN)))["kind"] == "Service"
    taken = replace(see(spec), taken_names=frozenset({("InferencePool", "chat")}))
    theirs = {key: each for key, each in taken.children.items() if key[0] != "InferencePool"}
    assert backend(plan_for(spec, replace(taken, children=theirs)))["kind"] == "Service"


def test_what_is_no_longer_asked_for_goes_and_the_route_leaves_the_pool_first() -> None:
    observed = see(valid(routing={**POOL, **ROUTE}))
    assert {kind for kind, _, _ in plan_for(valid(), observed).deletions} == {"InferencePool", "HTTPRoute"}
    without_pool = plan_for(valid(routing=ROUTE), observed)
    assert backend(without_pool)["kind"] == "Service"
    assert {kind for kind, _, _ in without_pool.deletions} == {"InferencePool"}


def test_while_the_port_changes_the_pool_has_that_of_most_ready_pods() -> None:
    old, new = valid(replicas=3, routing=POOL), valid(replicas=3, routing=POOL, engine={"port": 9000})
    children = {**see(old).children, **see(new).children}

    def port(num_old: int, num_new: int) -> int:
        pods = [pod(old.revision, n, is_available=True) for n in range(num_old)]
        pods += [pod(new.revision, n, is_available=True) for n in range(num_new)]
        observed = Observed(children, tuple(pods), frozenset(), sights=SEEN)
        (target,) = child(plan_for(new, observed), "InferencePool")["spec"]["targetPorts"]
        return int(target["number"])

    assert [port(3, 0), port(2, 1), port(1, 1), port(1, 2), port(0, 0)] == [10210, 10210, 9000, 9000, 9000]


@pytest.mark.parametrize(
    ("routing", "path"),
    [
        ({"httpRoute": {"hostnames": ["a"]}}, "spec.routing.httpRoute.hostnames"),
        ({"httpRoute": {"parentRefs": "web"}}, "spec.routing.httpRoute.parentRefs"),
        ({"inferencePool": {"endpointPickerRef": {}}}, "spec.routing.inferencePool.endpointPickerRef.name"),
        (
            {"inferencePool": {"endpointPickerRef": {"name": "x", "port": 0}}},
            "spec.routing.inferencePool.endpointPickerRef.port",
        ),
        (
            {"inferencePool": {"endpointPickerRef": {"name": "x", "failureMode": "Open"}}},
            "spec.routing.inferencePool.endpointPickerRef.failureMode",
        ),
        ({"inferencePool": "x"}, "spec.routing.inferencePool"),
    ],
)
def test_a_wrong_field_is_named(routing: Json, path: str) -> None:
    errors = parse(body(routing=routing))
    assert isinstance(errors, list)
    assert [error.path for error in errors if isinstance(error, FieldError)] == [path]


def said(generation: int, *gateways: tuple[str, str]) -> Json:
    """An HTTPRoute of generation 2 on which gateways have spoken: their words for Accepted and ResolvedRefs."""
    parents = [
        {
            "parentRef": {"name": f"web-{number}"},
            "conditions": [
                {"type": kind, "status": status, "message": "no such listener", "observedGeneration": generation}
                for kind, status in zip(("Accepted", "ResolvedRefs"), words, strict=True)
            ],
        }
        for number, words in enumerate(gateways)
    ]
    return {"metadata": {"name": "chat", "generation": 2}, "status": {"parents": parents}}


@pytest.mark.parametrize(
    ("routing", "pools", "routes", "route", "is_true", "reason"),
    [
        (POOL, KNOWN, KNOWN, None, True, "PoolMade"),
        (POOL, KNOWN, UNKNOWN, None, True, "PoolMade"),
        (POOL, UNKNOWN, KNOWN, None, False, "NoInferencePools"),
        (POOL, NOT_ALLOWED, NOT_ALLOWED, None, False, "RoutingNotAllowed"),
        (ROUTE, UNKNOWN, UNKNOWN, None, False, "NoHTTPRoutes"),
        ({**POOL, **ROUTE}, UNKNOWN, KNOWN, said(2, ("True", "True")), False, "NoInferencePools"),
        (ROUTE, UNKNOWN, KNOWN, None, False, "RouteWaits"),
        (ROUTE, KNOWN, KNOWN, said(2), False, "RouteWaits"),
        (ROUTE, KNOWN, KNOWN, said(1, ("True", "True")), False, "RouteWaits"),
        (ROUTE, KNOWN, KNOWN, said(1, ("False", "True")), False, "RouteWaits"),
        (ROUTE, KNOWN, KNOWN, said(2, ("True", "Unknown")), False, "RouteWaits"),
        (ROUTE, KNOWN, KNOWN, said(2, ("False", "True")), False, "RouteNotAccepted"),
        (ROUTE, KNOWN, KNOWN, said(2, ("True", "False")), False, "RouteNotAccepted"),
        (ROUTE, KNOWN, KNOWN, said(2, ("True", "True")), True, "RouteAccepted"),
    ],
)
def test_the_condition_says_what_is_missing_or_what_gateways_say(
    routing: Json, pools: str, routes: str, route: Json | None, is_true: bool, reason: str
) -> None:
    wanted = valid(routing=routing).routing
    found, why, message = explain_routed(wanted, pools, routes, route)
    assert (found, why) == (is_true, reason)
    assert message.endswith(".") is not is_true, "advice is a sentence of its own"
    assert "no such listener" in message or reason != "RouteNotAccepted"
    is_told_of_the_service = reason == "NoInferencePools" and "httpRoute" in routing
    assert ("requests go to the Service" in message) is is_told_of_the_service
